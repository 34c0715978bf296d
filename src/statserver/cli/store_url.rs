//! The URL of the store of a shared state.

use std::fmt;
use std::str::FromStr;

/// Where the store is: the flag `--store`.
#[derive(Clone, Debug)]
pub struct StoreUrl {
    /// The host and port of the server, or those of the sentinels.
    pub hosts: Vec<(String, u16)>,
    /// The master's name, if the hosts are sentinels.
    pub master: Option<String>,
    /// Whether over TLS.
    pub is_tls: bool,
    /// The user, if one is named.
    pub username: Option<String>,
    /// The password, if it is in the URL.
    pub password: Option<String>,
    /// The number of the database.
    pub database: i64,
}

impl FromStr for StoreUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected redis://[USER[:PASSWORD]@]HOST[:PORT][/DATABASE], valkey:// likewise, \
                                rediss:// or valkeys:// for TLS, or redis+sentinel://HOST[:PORT],HOST[:PORT]/MASTER[/DATABASE]";
        let expected = || EXPECTED.to_owned();
        let (scheme, rest) = text.split_once("://").ok_or_else(expected)?;
        let (engine, is_sentinel) = match scheme.split_once('+') {
            Some((engine, "sentinel")) => (engine, true),
            Some(_) => return Err(expected()),
            None => (scheme, false),
        };
        let is_tls = match engine {
            "redis" | "valkey" => false,
            "rediss" | "valkeys" => true,
            _ => return Err(expected()),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (username, password) = user.split_once(':').unwrap_or((user, ""));
        let decode = |text: &str| {
            let text = percent_encoding::percent_decode_str(text).decode_utf8().map_err(|_| expected())?;
            Ok::<_, String>(Some(text.into_owned()).filter(|text| !text.is_empty()))
        };
        let port = if is_sentinel { 26379 } else { 6379 };
        let hosts: Vec<(String, u16)> = hosts
            .split(',')
            .map(|host| host_and_port(host, port))
            .collect::<Option<_>>()
            .filter(|hosts: &Vec<_>| is_sentinel || hosts.len() == 1)
            .ok_or_else(expected)?;
        let (master, database) = match (is_sentinel, path.split_once('/')) {
            (false, _) => (None, path),
            (true, Some((master, database))) => (Some(master), database),
            (true, None) => (Some(path), ""),
        };
        let database = if database.is_empty() { Ok(0) } else { database.parse() };
        Ok(Self {
            hosts,
            master: match master {
                Some("") => return Err(expected()),
                master => master.map(str::to_owned),
            },
            is_tls,
            username: decode(username)?,
            password: decode(password)?,
            database: database.ok().filter(|database| *database >= 0).ok_or_else(expected)?,
        })
    }
}

fn host_and_port(text: &str, default: u16) -> Option<(String, u16)> {
    let (host, port) = match text.strip_prefix('[') {
        Some(ipv6) => {
            let (host, port) = ipv6.split_once(']')?;
            (host, port.strip_prefix(':').or(port.is_empty().then_some(""))?)
        }
        None if text.matches(':').count() > 1 => return None,
        None => text.split_once(':').unwrap_or((text, "")),
    };
    let port = if port.is_empty() { default } else { port.parse().ok().filter(|port| *port > 0)? };
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

impl fmt::Display for StoreUrl {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let engine = if self.is_tls { "rediss" } else { "redis" };
        let sentinel = if self.master.is_some() { "+sentinel" } else { "" };
        let host = |(host, port): &(String, u16)| match host.contains(':') {
            true => format!("[{host}]:{port}"),
            false => format!("{host}:{port}"),
        };
        let hosts: Vec<String> = self.hosts.iter().map(host).collect();
        write!(f, "{engine}{sentinel}://{}", hosts.join(","))?;
        if let Some(master) = &self.master {
            write!(f, "/{master}")?;
        }
        write!(f, "/{}", self.database)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_server_or_sentinels() {
        let shown = |text: &str| text.parse::<StoreUrl>().map(|url| url.to_string());
        let ok = |text: &str| Ok(text.to_owned());
        assert_eq!(shown("valkey://store"), ok("redis://store:6379/0"));
        assert_eq!(shown("redis://user:p%40ss@[::1]:7000/3"), ok("redis://[::1]:7000/3"));
        assert_eq!(shown("valkeys://store:1/"), ok("rediss://store:1/0"));
        assert_eq!(shown("redis+sentinel://a,b:7/main/2"), ok("redis+sentinel://a:26379,b:7/main/2"));
        let url: StoreUrl = "redis://user:p%40ss@store".parse().unwrap();
        assert_eq!((url.username.as_deref(), url.password.as_deref()), (Some("user"), Some("p@ss")));
        for wrong in [
            "store:6379",
            "http://store",
            "redis://",
            "redis://a,b",
            "redis://store:0",
            "redis://store:x",
            "redis://store/x",
            "redis://store/-1",
            "redis+cluster://store",
            "redis+sentinel://a",
            "redis+sentinel://a//2",
            "redis://[::1",
            "redis://a:1:2",
        ] {
            let error = shown(wrong).unwrap_err();
            assert!(error.starts_with("expected redis://"), "{wrong}");
        }
    }
}
