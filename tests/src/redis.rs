//! The store of a shared state: a real Redis out of Debian's packages, its sentinel, and a link to it
//! that a test can make slow, cut or point elsewhere.

use std::net::{SocketAddr, TcpListener as StdListener};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::process::Process;
use crate::tls::Identity;
use crate::{debian, wait};

const STARTED: Duration = Duration::from_secs(30);
const ANSWERED: Duration = Duration::from_secs(5);

/// Stands for the port in options.
const PORT: &str = "{port}";

/// Returns an address that nobody listens on.
fn free_address() -> SocketAddr {
    StdListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address")
}

/// Sends a command, and returns the answer's text.
///
/// # Errors
/// In one line: no connection, no answer, or an answer that is an error.
pub async fn command(to: SocketAddr, words: &[&str]) -> Result<String, String> {
    let ask = async {
        let mut stream = TcpStream::connect(to).await.map_err(|error| error.to_string())?;
        let mut request = format!("*{}\r\n", words.len());
        words.iter().for_each(|word| request.push_str(&format!("${}\r\n{word}\r\n", word.len())));
        stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
        let (mut answer, mut chunk) = (Vec::new(), [0; 4096]);
        loop {
            let count = stream.read(&mut chunk).await.map_err(|error| error.to_string())?;
            answer.extend_from_slice(&chunk[..count]);
            // Small answers come as a whole.
            if count == 0 || (count < chunk.len() && answer.ends_with(b"\r\n")) {
                break;
            }
        }
        Ok::<_, String>(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer: String = timeout(ANSWERED, ask).await.map_err(|_| "no answer")??;
    if answer.starts_with('-') || answer.is_empty() { Err(answer) } else { Ok(answer) }
}

/// A running Redis.
#[derive(Debug)]
pub struct Redis {
    /// Where it listens.
    pub address: SocketAddr,
    /// The process.
    pub process: Process,
    options: Vec<String>,
    folder: TempDir,
}

/// Options with which an answered command survives a crash.
pub const DURABLE: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];

impl Redis {
    /// Starts a Redis with more options.
    ///
    /// # Panics
    /// If it does not answer.
    pub async fn start(options: &[&str]) -> Self {
        let (folder, address) = (tempfile::tempdir().expect("a folder"), free_address());
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        let process = run(address, &folder, &options);
        let redis = Self { address, process, options, folder };
        redis.answers().await;
        redis
    }

    /// Starts a Redis that takes a password, and TLS with client certificates alone.
    pub async fn over_tls(password: &str, identity: &Identity, ca: &Path) -> Self {
        let path = |path: &Path| path.display().to_string();
        let (certificate, key, ca) = (path(&identity.certificate), path(&identity.key), path(ca));
        let tls = ["--tls-port", PORT, "--port", "0", "--tls-cert-file", &certificate];
        let more = ["--tls-key-file", &key, "--tls-ca-cert-file", &ca, "--requirepass", password];
        Self::start(&[&tls[..], &more[..]].concat()).await
    }

    /// Starts a replica of another one.
    pub async fn replica_of(master: &Self) -> Self {
        let port = master.address.port().to_string();
        let replica = Self::start(&["--replicaof", "127.0.0.1", &port]).await;
        wait::until("the replica has all", STARTED, || async {
            let info = command(replica.address, &["INFO", "replication"]).await?;
            if info.contains("master_link_status:up") { Ok(()) } else { Err(info) }
        })
        .await;
        replica
    }

    /// Returns it as a value of `--store`.
    pub fn url(&self) -> String {
        format!("redis://{}/0", self.address)
    }

    /// Kills it, and starts it again after `away`.
    pub async fn restart(&mut self, away: Duration) {
        self.process.kill();
        tokio::time::sleep(away).await;
        self.process = run(self.address, &self.folder, &self.options);
        self.answers().await;
    }

    /// Makes it a master.
    ///
    /// # Panics
    /// If it refuses.
    pub async fn promote(&self) {
        command(self.address, &["REPLICAOF", "NO", "ONE"]).await.expect("it is promoted");
    }

    async fn answers(&self) {
        wait::until("Redis answers", STARTED, || async {
            match command(self.address, &["PING"]).await {
                // With a password, or TLS alone, it answers something else.
                Ok(_) => Ok(()),
                Err(answer) if answer.starts_with("-NOAUTH") => Ok(()),
                Err(_)
                    if self.process.log().contains("Ready to accept connections")
                        && self.options.iter().any(|option| option == "--tls-port") =>
                {
                    Ok(())
                }
                Err(answer) => Err(format!("{answer}\n{}", self.process.log())),
            }
        })
        .await;
    }
}

fn run(address: SocketAddr, folder: &TempDir, options: &[String]) -> Process {
    let mut command = Command::new(debian("redis-server", &["redis-server"]));
    command.args(["--bind", "127.0.0.1", "--save", "", "--protected-mode", "no"]);
    let port = address.port().to_string();
    if !options.iter().any(|option| option == "--port") {
        command.args(["--port", &port]);
    }
    command.arg("--dir").arg(folder.path());
    command.args(options.iter().map(|option| if option == PORT { &port } else { option }));
    Process::start(&mut command, &folder.path().join("log"))
}

/// A sentinel that watches one master, named `inflight`.
#[derive(Debug)]
pub struct Sentinel {
    /// Where it listens.
    pub address: SocketAddr,
    _process: Process,
    _folder: TempDir,
}

impl Sentinel {
    /// Starts a sentinel that takes a master for dead after half a second.
    ///
    /// # Panics
    /// If it does not know its master and a replica.
    pub async fn start(master: &Redis) -> Self {
        let (folder, address) = (tempfile::tempdir().expect("a folder"), free_address());
        let file = folder.path().join("sentinel.conf");
        let text = format!(
            "port {}\nbind 127.0.0.1\nprotected-mode no\nsentinel monitor inflight 127.0.0.1 {} 1\n\
             sentinel down-after-milliseconds inflight 500\nsentinel failover-timeout inflight 5000\n",
            address.port(),
            master.address.port()
        );
        std::fs::write(&file, text).expect("a file");
        let mut program = Command::new(debian("redis-server", &["redis-server"]));
        program.arg(&file).arg("--sentinel");
        let process = Process::start(&mut program, &folder.path().join("log"));
        wait::until("the sentinel knows a replica", STARTED, || async {
            let replicas = command(address, &["SENTINEL", "replicas", "inflight"]).await?;
            if replicas.starts_with("*1") { Ok(()) } else { Err(replicas) }
        })
        .await;
        Self { address, _process: process, _folder: folder }
    }

    /// Returns the store as a value of `--store`.
    pub fn url(&self) -> String {
        format!("redis+sentinel://{}/inflight/0", self.address)
    }
}

/// How a link treats what passes it.
#[derive(Debug, Default)]
struct Faults {
    delay_ms: AtomicU64,
    /// Every so many appends the answer is lost; 0: never.
    cut_every: AtomicUsize,
    appends: AtomicUsize,
    cuts: AtomicUsize,
    refuses: AtomicBool,
}

/// A link to a Redis.
#[derive(Debug)]
pub struct Link {
    /// Where it listens.
    pub address: SocketAddr,
    faults: Arc<Faults>,
    target: Arc<Mutex<SocketAddr>>,
    /// Changes when all connections have to end.
    generation: watch::Sender<u64>,
    accepting: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.accepting.abort();
        self.generation.send_modify(|generation| *generation += 1);
    }
}

impl Link {
    /// Starts a link that passes on all.
    ///
    /// # Panics
    /// If it cannot listen.
    pub async fn to(redis: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (faults, target) = (Arc::new(Faults::default()), Arc::new(Mutex::new(redis)));
        let generation = watch::Sender::new(0);
        let accepting = tokio::spawn({
            let (faults, target, generation) = (Arc::clone(&faults), Arc::clone(&target), generation.clone());
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    let to = *target.lock().expect("no panic under this lock");
                    if faults.refuses.load(Ordering::SeqCst) {
                        continue;
                    }
                    tokio::spawn(connect(client, to, Arc::clone(&faults), generation.subscribe()));
                }
            }
        });
        Self { address, faults, target, generation, accepting }
    }

    /// Returns it as a value of `--store`.
    pub fn url(&self) -> String {
        format!("redis://{}/0", self.address)
    }

    /// Delays what passes, in both directions.
    pub fn delay(&self, delay: Duration) {
        self.faults.delay_ms.store(u64::try_from(delay.as_millis()).expect("short"), Ordering::SeqCst);
    }

    /// From now on the answer to every `every`-th append is lost, and its connection ends; 0: none.
    pub fn cut_every(&self, every: usize) {
        self.faults.cut_every.store(every, Ordering::SeqCst);
    }

    /// Returns how many answers were lost.
    pub fn cuts(&self) -> usize {
        self.faults.cuts.load(Ordering::SeqCst)
    }

    /// Ends all connections, and accepts none while `refuses`.
    pub fn refuse(&self, refuses: bool) {
        self.faults.refuses.store(refuses, Ordering::SeqCst);
        if refuses {
            self.generation.send_modify(|generation| *generation += 1);
        }
    }

    /// Ends all connections; new ones lead to another Redis.
    ///
    /// # Panics
    /// Never.
    pub fn lead_to(&self, redis: SocketAddr) {
        *self.target.lock().expect("no panic under this lock") = redis;
        self.generation.send_modify(|generation| *generation += 1);
    }
}

async fn connect(client: TcpStream, to: SocketAddr, faults: Arc<Faults>, mut ends: watch::Receiver<u64>) {
    ends.mark_unchanged();
    let Ok(server) = TcpStream::connect(to).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    // Once an append's answer is to be lost, nothing goes back any more.
    let is_cut = Arc::new(AtomicBool::new(false));
    let requests = pass(from_client, to_server, Arc::clone(&faults), {
        let (faults, is_cut) = (Arc::clone(&faults), Arc::clone(&is_cut));
        move |bytes: &[u8]| {
            if bytes.windows(4).any(|window| window == b"XADD") {
                let appends = faults.appends.fetch_add(1, Ordering::SeqCst) + 1;
                let every = faults.cut_every.load(Ordering::SeqCst);
                if every > 0 && appends.is_multiple_of(every) {
                    is_cut.store(true, Ordering::SeqCst);
                }
            }
            true
        }
    });
    let answers = pass(from_server, to_client, Arc::clone(&faults), {
        move |_: &[u8]| {
            let goes_on = !is_cut.load(Ordering::SeqCst);
            if !goes_on {
                faults.cuts.fetch_add(1, Ordering::SeqCst);
            }
            goes_on
        }
    });
    tokio::select! {
        () = requests => {}
        () = answers => {}
        _ = ends.changed() => {}
    }
}

/// Passes bytes on, until `look` says that they are not to be, or either side ends.
async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    faults: Arc<Faults>,
    look: impl Fn(&[u8]) -> bool,
) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(1_024);
    let read = async move {
        let mut chunk = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut chunk).await {
            if !look(&chunk[..count]) {
                return;
            }
            let delay = Duration::from_millis(faults.delay_ms.load(Ordering::SeqCst));
            if sender.send((Instant::now() + delay, chunk[..count].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = receiver.recv().await {
            sleep_until(due).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = read => {}
        () = write => {}
    }
}
