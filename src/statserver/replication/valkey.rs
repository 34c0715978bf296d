//! The store: Valkey, or Redis from 6.2 on. The only module that speaks to it.
//!
//! | key | type | contents |
//! |---|---|---|
//! | `inflight:log` | stream | the entries, each in the field `e` |
//! | `inflight:snapshot` | hash | the newest snapshot: epoch, position, and where its pieces are |
//! | `inflight:snapshot:NAME:N` | string | piece N of a snapshot |
//! | `inflight:lease` | string | which server ticks and writes snapshots |
//! | `inflight:members` | hash | what each server says of itself, once a second |

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, Cmd, ConnectionAddr, ConnectionInfo, FromRedisValue,
    IntoConnectionInfo, RedisConnectionInfo, RedisError, TlsCertificates, Value, cmd,
};

use crate::cli::store_url::StoreUrl;
use crate::os::files;
use crate::replication::snapshot::Snapshot;
use crate::replication::stream_id::StreamId;

const LOG: &str = "inflight:log";
const SNAPSHOT: &str = "inflight:snapshot";
const LEASE: &str = "inflight:lease";
const MEMBERS: &str = "inflight:members";
/// How long a lease lasts that is not renewed.
const LEASE_MS: u64 = 2_000;
/// How long anything may take that does not wait for entries.
const TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the store waits for an entry before it answers that there is none.
const BLOCK: Duration = Duration::from_millis(1_000);
/// An answer that waits for entries is late after so long.
const READ_TIMEOUT: Duration = Duration::from_millis(3_500);
/// Pieces of a snapshot that nobody finished are gone after so long.
const PIECE_SECONDS: u64 = 900;
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Sets the lease or renews it. Answers whether it is this server's.
const TAKE_LEASE: &str = r"
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1";

const RELEASE_LEASE: &str = r"
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0";

/// Replaces the snapshot by a newer one, whose pieces are there already, and trims the log to what
/// comes after the old one: a server that was away for less finds the entry that it applied last, or
/// knows that it is lost. An epoch begins with all that the log has. ARGV: the epoch that the present
/// snapshot must have, the new one's epoch, applied entries, position, name, number of pieces, digest,
/// unix time; then, for a new epoch only, the entry that says so. Answers 1, or 0 if nothing was done.
const REPLACE: &str = r"
local now = redis.call('HMGET', KEYS[2], 'epoch', 'applied', 'name', 'pieces', 'id')
local epoch, applied = now[1] or '0', tonumber(now[2] or '-1')
if epoch ~= ARGV[1] then return 0 end
if ARGV[1] == ARGV[2] and applied >= tonumber(ARGV[3]) then return 0 end
for piece = 0, tonumber(ARGV[6]) - 1 do
  if redis.call('PERSIST', KEYS[2] .. ':' .. ARGV[5] .. ':' .. piece) == 0 then return 0 end
end
redis.call('HSET', KEYS[2], 'epoch', ARGV[2], 'applied', ARGV[3], 'id', ARGV[4], 'name', ARGV[5],
  'pieces', ARGV[6], 'digest', ARGV[7], 'time', ARGV[8])
if ARGV[9] then
  redis.call('HSET', KEYS[2], 'from', '0-0', 'first', '1')
  redis.call('XADD', KEYS[1], '*', 'e', ARGV[9])
else
  redis.call('HSET', KEYS[2], 'from', now[5], 'first', '0')
  redis.call('XTRIM', KEYS[1], 'MINID', now[5])
end
if now[3] and now[3] ~= ARGV[5] then
  for piece = 0, math.min(tonumber(now[4]), 65536) - 1 do
    redis.call('UNLINK', KEYS[2] .. ':' .. now[3] .. ':' .. piece)
  end
end
return 1";

/// Why the store did not do what was asked.
#[derive(Debug)]
pub enum StoreError {
    /// It cannot be reached, or refused.
    Redis(RedisError),
    /// It answered what no Valkey answers.
    Answer(&'static str),
    /// None of the sentinels knows the master.
    NoMaster,
    /// A file, and why it cannot be read.
    File(PathBuf, std::io::Error),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Redis(error) => write!(f, "{error}"),
            Self::Answer(expected) => write!(f, "an unexpected answer; expected {expected}"),
            Self::NoMaster => f.write_str("no sentinel names a master"),
            Self::File(path, error) => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl std::error::Error for StoreError {}

impl From<RedisError> for StoreError {
    fn from(error: RedisError) -> Self {
        Self::Redis(error)
    }
}

/// How to reach the store.
#[derive(Clone, Debug)]
pub struct Valkey {
    /// Where it is.
    pub url: StoreUrl,
    /// A file whose first line is the password.
    pub password_file: Option<PathBuf>,
    /// CA certificates, instead of the system's.
    pub ca: Option<PathBuf>,
    /// The client's certificate chain and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

/// Two connections to the store. They end together.
#[derive(Clone)]
pub struct Connection {
    /// For what is answered at once.
    asking: MultiplexedConnection,
    /// For what waits for entries.
    reading: MultiplexedConnection,
}

/// What the log has after a position.
#[derive(Clone, Debug, PartialEq)]
pub struct Tail {
    /// The entries, in order.
    pub entries: Vec<(StreamId, Vec<u8>)>,
    /// The epoch that the log was of afterwards; `None` without a snapshot, and so without a log.
    pub epoch: Option<u64>,
    /// Entries before this position had been trimmed by then.
    pub from: StreamId,
}

/// The newest snapshot of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotHeader {
    /// Its epoch.
    pub epoch: u64,
    /// The last entry that is in it.
    pub id: StreamId,
    /// Entries before this position have been trimmed from the log.
    pub from: StreamId,
    /// Whether its epoch began with it.
    pub is_first: bool,
    /// When it was written, in unix seconds.
    pub unix_seconds: u64,
    name: String,
    pieces: u64,
    digest: String,
}

impl Valkey {
    /// Connects. The files are read each time: they may have changed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn connect(&self) -> Result<Connection, StoreError> {
        let (host, port) = match &self.url.master {
            None => self.url.hosts.first().cloned().ok_or(StoreError::NoMaster)?,
            Some(master) => self.find_master(master).await?,
        };
        let client = self.client(&host, port, true)?;
        let config = |timeout| {
            AsyncConnectionConfig::new()
                .set_connection_timeout(Some(CONNECT_TIMEOUT))
                .set_response_timeout(Some(timeout))
        };
        let connect =
            async |timeout| client.get_multiplexed_async_connection_with_config(&config(timeout)).await;
        let (mut asking, reading) = (connect(TIMEOUT).await?, connect(READ_TIMEOUT).await?);
        // A replica would be read from, and nothing could be written.
        let role: Value = cmd("ROLE").query_async(&mut asking).await?;
        match role {
            Value::Array(values) if values.first().is_some_and(|role| text_of(role) == Some("master")) => {}
            _ => return Err(StoreError::Answer("the role `master` of the server that --store names")),
        }
        Ok(Connection { asking, reading })
    }

    async fn find_master(&self, name: &str) -> Result<(String, u16), StoreError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(CONNECT_TIMEOUT));
        let mut failed = StoreError::NoMaster;
        for (host, port) in &self.url.hosts {
            let ask = async {
                let client = self.client(host, *port, false)?;
                let mut sentinel = client.get_multiplexed_async_connection_with_config(&config).await?;
                let mut ask = cmd("SENTINEL");
                ask.arg("get-master-addr-by-name").arg(name);
                Ok::<Option<(String, u16)>, StoreError>(ask.query_async(&mut sentinel).await?)
            };
            match ask.await {
                Ok(Some(master)) => return Ok(master),
                Ok(None) => {}
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// Sentinels have neither databases nor, as a rule, a password.
    fn client(&self, host: &str, port: u16, is_server: bool) -> Result<Client, StoreError> {
        let host = host.to_owned();
        let address = match self.url.is_tls {
            true => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
            false => ConnectionAddr::Tcp(host, port),
        };
        let mut settings = RedisConnectionInfo::default();
        if is_server {
            settings = settings.set_db(self.url.database);
            if let Some(username) = &self.url.username {
                settings = settings.set_username(username);
            }
            if let Some(password) = self.password()? {
                settings = settings.set_password(password);
            }
        }
        let info: ConnectionInfo = address.into_connection_info()?.set_redis_settings(settings);
        if !self.url.is_tls {
            return Ok(Client::open(info)?);
        }
        let client_tls = match &self.certificate {
            Some((certificate, key)) => {
                Some(ClientTlsConfig { client_cert: read(certificate)?, client_key: read(key)? })
            }
            None => None,
        };
        let root_cert = self.ca.as_deref().map(read).transpose()?;
        Ok(Client::build_with_tls(info, TlsCertificates { client_tls, root_cert })?)
    }

    fn password(&self) -> Result<Option<String>, StoreError> {
        let Some(file) = &self.password_file else { return Ok(self.url.password.clone()) };
        let bytes = read(file)?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(text.lines().next().map(|line| line.trim().to_owned()).filter(|password| !password.is_empty()))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, StoreError> {
    files::read(path, MAX_FILE_BYTES).map_err(|error| StoreError::File(path.to_path_buf(), error))
}

fn text_of(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}

impl Connection {
    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, StoreError> {
        Ok(command.query_async(&mut self.asking.clone()).await?)
    }

    /// Appends an entry. If this fails, it may be stored or not.
    ///
    /// # Errors
    /// [`StoreError`]. There must be a log.
    pub async fn append(&self, entry: &[u8]) -> Result<(), StoreError> {
        let mut append = cmd("XADD");
        append.arg(LOG).arg("NOMKSTREAM").arg("*").arg("e").arg(entry);
        self.ask::<Option<String>>(&append).await?.map(drop).ok_or(StoreError::Answer("a log to append to"))
    }

    /// Returns the entries after a position: at once if there are any, else, if asked to wait, within a
    /// second.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn read_after(&self, id: StreamId, count: usize, waits: bool) -> Result<Tail, StoreError> {
        let mut read = cmd("XREAD");
        read.arg("COUNT").arg(count);
        if waits {
            read.arg("BLOCK").arg(BLOCK.as_millis() as u64);
        }
        read.arg("STREAMS").arg(LOG).arg(id.to_string());
        // The second command is executed after the first has its answer. So if the log was trimmed or
        // began anew before the first read it, the second one tells.
        let mut both = redis::pipe();
        both.add_command(read).cmd("HMGET").arg(SNAPSHOT).arg("epoch").arg("from");
        let (entries, (epoch, from)): (Value, (Option<String>, Option<String>)) =
            both.query_async(&mut self.reading.clone()).await?;
        // Of one stream: its name and its entries.
        let entries = match entries {
            Value::Nil => Some(Value::Array(Vec::new())),
            Value::Array(mut streams) => match streams.pop() {
                Some(Value::Array(mut stream)) => stream.pop(),
                _ => None,
            },
            _ => None,
        };
        let entries =
            entries.map(entries_of).unwrap_or(Err(StoreError::Answer("a stream and its entries")))?;
        let epoch = epoch.and_then(|epoch| epoch.parse().ok());
        Ok(Tail { entries, epoch, from: from.and_then(|from| from.parse().ok()).unwrap_or_default() })
    }

    /// Returns the entries from one position to another.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn range(&self, from: StreamId, count: usize) -> Result<Vec<(StreamId, Vec<u8>)>, StoreError> {
        let mut range = cmd("XRANGE");
        range.arg(LOG).arg(from.to_string()).arg("+").arg("COUNT").arg(count);
        entries_of(self.ask(&range).await?)
    }

    /// Returns what is known of the newest snapshot.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn snapshot_header(&self) -> Result<Option<SnapshotHeader>, StoreError> {
        let fields: HashMap<String, String> = self.ask(cmd("HGETALL").arg(SNAPSHOT)).await?;
        if fields.is_empty() {
            return Ok(None);
        }
        let number = |name: &str| fields.get(name).and_then(|text| text.parse::<u64>().ok());
        let header = (|| {
            Some(SnapshotHeader {
                epoch: number("epoch")?,
                id: fields.get("id")?.parse().ok()?,
                from: fields.get("from")?.parse().ok()?,
                is_first: number("first")? == 1,
                unix_seconds: number("time")?,
                pieces: number("pieces")?,
                name: fields.get("name")?.clone(),
                digest: fields.get("digest")?.clone(),
            })
        })();
        header.map(Some).ok_or(StoreError::Answer("a snapshot in the hash inflight:snapshot"))
    }

    /// Returns the pieces of a snapshot; `None` if it was replaced meanwhile, or is damaged.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn snapshot(&self, header: &SnapshotHeader) -> Result<Option<Vec<Vec<u8>>>, StoreError> {
        let mut pieces = Vec::new();
        for piece in 0..header.pieces {
            let key = format!("{SNAPSHOT}:{}:{piece}", header.name);
            match self.ask::<Option<Vec<u8>>>(cmd("GET").arg(key)).await? {
                Some(bytes) => pieces.push(bytes),
                None => return Ok(None),
            }
        }
        Ok((crate::replication::snapshot::digest(&pieces) == header.digest).then_some(pieces))
    }

    /// Replaces the snapshot by a newer one of the same epoch, and trims the log. Returns whether it
    /// did: not if there is a newer one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn replace_snapshot(
        &self,
        snapshot: &Snapshot,
        name: &str,
        unix_seconds: u64,
    ) -> Result<bool, StoreError> {
        self.replace(snapshot, name, unix_seconds, snapshot.progress.epoch, None).await
    }

    /// Replaces the snapshot by one of a new epoch, and adds an entry that says so, if the present one
    /// is of the epoch `before`. Returns whether it did. What the log has after the snapshot's position
    /// is to be applied again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn begin_epoch(
        &self,
        snapshot: &Snapshot,
        name: &str,
        unix_seconds: u64,
        before: u64,
        entry: &[u8],
    ) -> Result<bool, StoreError> {
        self.replace(snapshot, name, unix_seconds, before, Some(entry)).await
    }

    async fn replace(
        &self,
        snapshot: &Snapshot,
        name: &str,
        unix_seconds: u64,
        before: u64,
        entry: Option<&[u8]>,
    ) -> Result<bool, StoreError> {
        let Snapshot { progress, pieces, digest } = snapshot;
        for (number, piece) in pieces.iter().enumerate() {
            let key = format!("{SNAPSHOT}:{name}:{number}");
            self.ask::<()>(cmd("SET").arg(key).arg(piece).arg("EX").arg(PIECE_SECONDS)).await?;
        }
        let mut replace = cmd("EVAL");
        replace.arg(REPLACE).arg(2).arg(LOG).arg(SNAPSHOT);
        replace.arg(before).arg(progress.epoch).arg(progress.applied).arg(progress.id.to_string());
        replace.arg(name).arg(pieces.len()).arg(digest).arg(unix_seconds);
        if let Some(entry) = entry {
            replace.arg(entry);
        }
        self.ask(&replace).await
    }

    /// Takes the lease, or renews it. Returns whether it is this server's.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn take_lease(&self, server: u64) -> Result<bool, StoreError> {
        let mut take = cmd("EVAL");
        take.arg(TAKE_LEASE).arg(1).arg(LEASE).arg(server).arg(LEASE_MS);
        self.ask(&take).await
    }

    /// Gives the lease back, if it is this server's.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn release_lease(&self, server: u64) -> Result<(), StoreError> {
        self.ask::<i64>(cmd("EVAL").arg(RELEASE_LEASE).arg(1).arg(LEASE).arg(server)).await.map(drop)
    }

    /// Says something of this server, and returns what each says of itself.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn exchange(&self, server: u64, word: &str) -> Result<HashMap<u64, String>, StoreError> {
        self.ask::<i64>(cmd("HSET").arg(MEMBERS).arg(server).arg(word)).await?;
        self.ask(cmd("HGETALL").arg(MEMBERS)).await
    }

    /// Forgets what a server says of itself.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget_member(&self, server: u64) -> Result<(), StoreError> {
        self.ask::<i64>(cmd("HDEL").arg(MEMBERS).arg(server)).await.map(drop)
    }
}

fn entries_of(entries: Value) -> Result<Vec<(StreamId, Vec<u8>)>, StoreError> {
    let expected = || StoreError::Answer("entries with an id and the field `e`");
    let Value::Array(entries) = entries else { return Err(expected()) };
    let entry = |entry: Value| {
        let Value::Array(mut parts) = entry else { return Err(expected()) };
        let (fields, id) = (parts.pop(), parts.pop());
        let id = id.as_ref().and_then(text_of).and_then(|id| id.parse().ok()).ok_or_else(expected)?;
        match fields {
            Some(Value::Array(mut fields)) => match fields.pop() {
                Some(Value::BulkString(bytes)) => Ok((id, bytes)),
                _ => Err(expected()),
            },
            _ => Err(expected()),
        }
    };
    entries.into_iter().map(entry).collect()
}
