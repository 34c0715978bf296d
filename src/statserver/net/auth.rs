//! Who may do what: bearer tokens from a file, each for some namespaces, and client certificates.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use inflight_stats::protocol::report::{NameError, check_name};
use subtle::{Choice, ConstantTimeEq};
use tokio::sync::watch;
use tracing::{error, info};

use crate::cli::flags::AnonymousAccess;
use crate::os::files;

/// Maximum number of tokens in the file.
const MAX_TOKENS: usize = 10_000;
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Shorter ones can be guessed.
const MIN_TOKEN_BYTES: usize = 16;
const MAX_TOKEN_BYTES: usize = 4096;
/// The form of a line.
const LINE: &str = "`TOKEN NAMESPACES [admin]`";

/// What is known of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// It has a certificate that the client CA signed.
    pub has_certificate: bool,
    /// Where it connects from.
    pub address: Option<IpAddr>,
}

/// What a client may do.
#[derive(Clone, PartialEq, Eq)]
pub struct Grant {
    /// In these namespaces; `None`: in all.
    namespaces: Option<Arc<[String]>>,
    /// Whether it may change the settings of keys.
    pub admin: bool,
    /// The token that grants it, to be looked up again when the file has changed.
    secret: Option<Arc<[u8]>>,
}

/// Without the secret, which must not be logged.
impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant").field("namespaces", &self.namespaces).field("admin", &self.admin).finish()
    }
}

impl Grant {
    /// For everybody on this machine, if there are no tokens.
    const ALL: Self = Self { namespaces: None, admin: true, secret: None };
    /// For clients with a certificate, and for everybody if the address is open to others: changing
    /// settings always requires an admin token.
    const EVERY_NAMESPACE: Self = Self { namespaces: None, admin: false, secret: None };

    /// Returns whether it is for a namespace.
    pub fn covers(&self, namespace: &str) -> bool {
        self.namespaces.as_ref().is_none_or(|namespaces| namespaces.iter().any(|own| own == namespace))
    }
}

/// Why a client is refused whose token does not cover a namespace, in the log.
pub const NOT_COVERED: &str = "the token does not cover the namespace";
/// Why a client is refused that may not change settings.
pub const NOT_ADMIN: &str = "changing settings requires a token that is marked admin";

/// Returns why a request about a namespace is refused whose token does not cover it.
pub fn not_covered(namespace: &str) -> String {
    format!("the token does not cover namespace {namespace}")
}

/// Why a client is not authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unauthenticated {
    /// It shows no token.
    NoToken,
    /// It shows a token that is not in the file.
    UnknownToken,
    /// It shows no certificate, and there are no tokens.
    NoCertificate,
}

impl Unauthenticated {
    /// Returns the reason in words.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoToken => "no bearer token",
            Self::UnknownToken => "unknown bearer token",
            Self::NoCertificate => "no client certificate",
        }
    }
}

impl fmt::Display for Unauthenticated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}

impl std::error::Error for Unauthenticated {}

struct Token {
    secret: Arc<[u8]>,
    grant: Grant,
}

/// Who may do what, as the file of tokens has it now.
pub struct Access {
    file: Option<PathBuf>,
    /// Whether a certificate authenticates.
    certificates: bool,
    anonymous: AnonymousAccess,
    tokens: RwLock<(Vec<u8>, Arc<[Token]>)>,
    /// How often the tokens have changed.
    changes: watch::Sender<u64>,
}

/// A line that is no token. The error does not show the line, which may contain a secret.
#[derive(Debug, PartialEq, Eq)]
struct InvalidLine {
    number: usize,
    mistake: Mistake,
}

#[derive(Debug, PartialEq, Eq)]
enum Mistake {
    NotUtf8,
    NoNamespaces,
    NotAdmin,
    /// The token has so many bytes.
    TokenBytes(usize),
    MixedWildcard,
    Namespace(NameError),
    TooMany,
    /// The token is that of this line.
    Repeated(usize),
}

impl fmt::Display for InvalidLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, mistake } = self;
        write!(f, "line {number}")?;
        match mistake {
            Mistake::NotUtf8 => f.write_str(" is not UTF-8"),
            Mistake::NoNamespaces => {
                write!(f, ": the namespaces are missing; expected {LINE}")
            }
            Mistake::NotAdmin => {
                write!(f, ": a word after the namespaces is not `admin`; expected {LINE}")
            }
            Mistake::TokenBytes(bytes) => {
                write!(f, ": the token has {bytes} bytes; expected {MIN_TOKEN_BYTES} to {MAX_TOKEN_BYTES}")
            }
            Mistake::MixedWildcard => {
                f.write_str(": `*` is mixed with names of namespaces; expected `*` alone, or names")
            }
            Mistake::Namespace(error) => write!(f, ": a namespace {error}"),
            Mistake::TooMany => write!(f, ": there are more tokens than {MAX_TOKENS}"),
            Mistake::Repeated(first) => {
                write!(f, ": the token is that of line {first} again; expected each token once")
            }
        }
    }
}

impl Access {
    /// Reads the file, if there is one.
    ///
    /// # Errors
    /// In one line, without a secret.
    pub fn load(file: Option<&Path>, certificates: bool, anonymous: AnonymousAccess) -> Result<Self, String> {
        let tokens = match file {
            None => (Vec::new(), Arc::default()),
            Some(path) => {
                read(path).map_err(|reason| format!("--token-file {}: {reason}", path.display()))?
            }
        };
        let anonymous = if file.is_some() || certificates { AnonymousAccess::Denied } else { anonymous };
        let (tokens, changes) = (RwLock::new(tokens), watch::Sender::default());
        Ok(Self { file: file.map(Path::to_owned), certificates, anonymous, tokens, changes })
    }

    /// Reads the file again. A file that is wrong changes nothing.
    pub fn reload(&self) {
        let Some(path) = &self.file else { return };
        match read(path) {
            Err(reason) => {
                error!(file = %path.display(), reason, "cannot load the changed tokens; keeping the old ones")
            }
            Ok(new) => {
                let mut tokens = self.tokens.write().unwrap_or_else(PoisonError::into_inner);
                if tokens.0 != new.0 {
                    info!(file = %path.display(), tokens = new.1.len(), "loaded the changed tokens");
                    *tokens = new;
                    drop(tokens);
                    self.changes.send_modify(|changes| *changes += 1);
                }
            }
        }
    }

    /// Returns what the value of an `authorization` header allows: `Bearer TOKEN`, or `Basic` with
    /// the token as the password, which is what a browser can send. Without one, returns what a
    /// certificate allows. Every token is compared, each in constant time.
    ///
    /// # Errors
    /// [`Unauthenticated`].
    pub fn check(&self, authorization: Option<&[u8]>, peer: Peer) -> Result<Grant, Unauthenticated> {
        match self.anonymous {
            AnonymousAccess::Full => return Ok(Grant::ALL),
            AnonymousAccess::WithoutSettings => return Ok(Grant::EVERY_NAMESPACE),
            AnonymousAccess::Denied => {}
        }
        match (&self.file, authorization) {
            (None, _) | (Some(_), None) => {
                let is_certified = self.certificates && peer.has_certificate;
                let missing = match self.file {
                    Some(_) => Unauthenticated::NoToken,
                    None => Unauthenticated::NoCertificate,
                };
                return if is_certified { Ok(Grant::EVERY_NAMESPACE) } else { Err(missing) };
            }
            // A token that is shown must be right, also beside a certificate.
            (Some(_), Some(_)) => {}
        }
        let secret = authorization.and_then(secret).ok_or(Unauthenticated::NoToken)?;
        self.find(&secret).ok_or(Unauthenticated::UnknownToken)
    }

    fn find(&self, secret: &[u8]) -> Option<Grant> {
        let tokens = Arc::clone(&self.tokens.read().unwrap_or_else(PoisonError::into_inner).1);
        let mut found = None;
        for token in tokens.iter() {
            let same: Choice = token.secret.ct_eq(secret);
            if bool::from(same) {
                found = Some(token.grant.clone());
            }
        }
        found
    }

    /// Resolves once the token that granted this is no longer in the file, or grants something
    /// else: what was opened with it has to end then.
    pub async fn revoked(&self, grant: &Grant) {
        let Some(secret) = &grant.secret else { return std::future::pending().await };
        let mut changes = self.changes.subscribe();
        while self.find(secret).as_ref() == Some(grant) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Returns whether nobody has to authenticate.
    pub fn is_open(&self) -> bool {
        !matches!(self.anonymous, AnonymousAccess::Denied)
    }
}

fn secret(authorization: &[u8]) -> Option<Vec<u8>> {
    let space = authorization.iter().position(|byte| *byte == b' ')?;
    let (scheme, value) = authorization.split_at_checked(space)?;
    let value = value.trim_ascii();
    if scheme.eq_ignore_ascii_case(b"bearer") {
        Some(value.to_vec())
    } else if scheme.eq_ignore_ascii_case(b"basic") {
        let decoded = STANDARD.decode(value).ok()?;
        let colon = decoded.iter().position(|byte| *byte == b':')?;
        decoded.get(colon + 1..).map(<[u8]>::to_vec)
    } else {
        None
    }
}

type Tokens = (Vec<u8>, Arc<[Token]>);

fn read(path: &Path) -> Result<Tokens, String> {
    let bytes = files::read(path, MAX_FILE_BYTES).map_err(|error| error.to_string())?;
    let tokens = parse(&bytes).map_err(|error| error.to_string())?;
    if tokens.is_empty() {
        return Err(format!("no token in it; expected lines {LINE}"));
    }
    Ok((bytes, tokens.into()))
}

fn parse(bytes: &[u8]) -> Result<Vec<Token>, InvalidLine> {
    let mut tokens = Vec::new();
    let mut known = HashMap::new();
    // The byte order mark of some editors would become a part of the first token.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let invalid = |mistake| InvalidLine { number, mistake };
        let line = std::str::from_utf8(line).map_err(|_| invalid(Mistake::NotUtf8))?.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split_ascii_whitespace();
        let (Some(secret), Some(namespaces)) = (words.next(), words.next()) else {
            return Err(invalid(Mistake::NoNamespaces));
        };
        let admin = match (words.next(), words.next()) {
            (None, None) => false,
            (Some("admin"), None) => true,
            _ => return Err(invalid(Mistake::NotAdmin)),
        };
        if !(MIN_TOKEN_BYTES..=MAX_TOKEN_BYTES).contains(&secret.len()) {
            return Err(invalid(Mistake::TokenBytes(secret.len())));
        }
        let namespaces = match namespaces {
            "*" => None,
            list => {
                let list: Vec<String> = list.split(',').map(str::to_owned).collect();
                if list.iter().any(|namespace| namespace == "*") {
                    return Err(invalid(Mistake::MixedWildcard));
                }
                list.iter()
                    .try_for_each(|namespace| check_name(namespace))
                    .map_err(|error| invalid(Mistake::Namespace(error)))?;
                Some(list.into())
            }
        };
        if tokens.len() == MAX_TOKENS {
            return Err(invalid(Mistake::TooMany));
        }
        let secret: Arc<[u8]> = secret.as_bytes().into();
        if let Some(first) = known.insert(Arc::clone(&secret), number) {
            return Err(invalid(Mistake::Repeated(first)));
        }
        let grant = Grant { namespaces, admin, secret: Some(Arc::clone(&secret)) };
        tokens.push(Token { secret, grant });
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str =
        "# who may report\nshop-token-0123456789 shop,cart\n\n  root-token-0123456789   *  admin \n";

    const NOBODY: Peer = Peer { has_certificate: false, address: None };
    const CERTIFIED: Peer = Peer { has_certificate: true, address: None };

    #[test]
    fn a_certificate_is_good_for_every_namespace_and_for_no_settings() {
        let (folder, _) = access(FILE);
        let file = folder.path().join("tokens");
        let cases = [(None, Unauthenticated::NoCertificate), (Some(&*file), Unauthenticated::NoToken)];
        for (file, reason) in cases {
            let access = Access::load(file, true, AnonymousAccess::Full).unwrap();
            assert_eq!(access.check(None, NOBODY), Err(reason));
            let grant = access.check(None, CERTIFIED).unwrap();
            assert_eq!((grant.covers("anything"), grant.admin), (true, false));
        }
        let both = Access::load(Some(&file), true, AnonymousAccess::WithoutSettings).unwrap();
        let wrong = both.check(Some(b"Bearer wrong-wrong-wrong-wrong"), CERTIFIED);
        assert_eq!(wrong, Err(Unauthenticated::UnknownToken));
        assert!(!both.check(Some(b"Bearer shop-token-0123456789"), CERTIFIED).unwrap().covers("other"));
        // A certificate that nobody asked for is none.
        let tokens = Access::load(Some(&file), false, AnonymousAccess::WithoutSettings).unwrap();
        assert_eq!(tokens.check(None, CERTIFIED), Err(Unauthenticated::NoToken));
    }

    fn access(text: &str) -> (tempfile::TempDir, Result<Access, String>) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokens");
        std::fs::write(&file, text).unwrap();
        let access = Access::load(Some(&file), false, AnonymousAccess::WithoutSettings);
        (folder, access)
    }

    #[test]
    fn a_token_is_good_for_its_namespaces_alone() {
        let (_folder, access) = access(FILE);
        let access = access.unwrap();
        let shop = access.check(Some(b"Bearer shop-token-0123456789"), NOBODY).unwrap();
        assert_eq!(
            (shop.covers("shop"), shop.covers("cart"), shop.covers("shopx"), shop.admin),
            (true, true, false, false)
        );
        let root = access.check(Some(b"bearer  root-token-0123456789"), NOBODY).unwrap();
        assert_eq!((root.covers("anything"), root.admin), (true, true));
        let browser = format!("Basic {}", STANDARD.encode("anyone:shop-token-0123456789"));
        assert_eq!(access.check(Some(browser.as_bytes()), NOBODY).unwrap(), shop);
        let unknown = Err(Unauthenticated::UnknownToken);
        assert_eq!(access.check(Some(b"Bearer shop-token-012345678"), NOBODY), unknown);
        assert_eq!(access.check(Some(b"Bearer "), NOBODY), unknown);
        for none in [&b"Bearer"[..], b"Basic !!!", b"Basic YWJj", b"", b"\xff \xff"] {
            assert_eq!(access.check(Some(none), NOBODY), Err(Unauthenticated::NoToken), "{none:?}");
        }
        assert_eq!(access.check(None, NOBODY), Err(Unauthenticated::NoToken));
    }

    #[test]
    fn without_a_file_everybody_on_this_machine_may_and_others_may_not_tell_keys_anything() {
        let access = |anonymous| Access::load(None, false, anonymous).unwrap().check(None, NOBODY);
        assert_eq!(access(AnonymousAccess::Full), Ok(Grant::ALL));
        let insecure = access(AnonymousAccess::WithoutSettings).unwrap();
        assert_eq!((insecure.covers("anything"), insecure.admin), (true, false));
        assert_eq!(access(AnonymousAccess::Denied), Err(Unauthenticated::NoCertificate));
    }

    #[test]
    fn what_an_editor_begins_a_file_with_is_no_part_of_the_first_token() {
        let (_folder, access) = access("\u{feff}shop-token-0123456789 shop\r\n\r\n");
        let access = access.unwrap();
        assert!(access.check(Some(b"Bearer shop-token-0123456789"), NOBODY).unwrap().covers("shop"));
    }

    #[tokio::test]
    async fn whoever_had_a_token_that_is_gone_or_grants_something_else_is_told() {
        let (folder, access) = access(FILE);
        let access = access.unwrap();
        let file = folder.path().join("tokens");
        let grant = |token: &str| access.check(Some(format!("Bearer {token}").as_bytes()), NOBODY).unwrap();
        let (shop, root) = (grant("shop-token-0123456789"), grant("root-token-0123456789"));
        let mut revoked = std::pin::pin!(access.revoked(&shop));
        let is_revoked = async |revoked: &mut std::pin::Pin<&mut _>| {
            futures_util::future::poll_immediate(revoked).await.is_some()
        };
        assert!(!is_revoked(&mut revoked).await);
        std::fs::write(&file, "shop-token-0123456789 shop,cart\nroot-token-0123456789 *\n").unwrap();
        access.reload();
        assert!(!is_revoked(&mut revoked).await, "another line changed");
        access.revoked(&root).await;
        std::fs::write(&file, "root-token-0123456789 *\n").unwrap();
        access.reload();
        revoked.await;
    }

    #[test]
    fn a_wrong_file_is_refused_without_its_secrets() {
        for (text, reason) in [
            ("secret-secret-secret", "line 1: the namespaces are missing"),
            ("\nsecret *", "line 2: the token has 6 bytes; expected 16 to 4096"),
            ("secret-secret-secret * root", "is not `admin`"),
            ("# nothing\n", "no token in it"),
            ("secret-secret-secret *,x", "line 1: `*` is mixed"),
            ("secret-secret-secret a,,b", "line 1: a namespace is empty; expected 1 to 512 bytes"),
            ("secret-secret-secret a\n\nsecret-secret-secret b", "line 3: the token is that of line 1 again"),
        ] {
            let error = access(text).1.err().unwrap();
            assert!(error.contains(reason) && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_changed_file_is_taken_over_and_a_wrong_one_is_not() {
        let (folder, access) = access(FILE);
        let access = access.unwrap();
        let file = folder.path().join("tokens");
        std::fs::write(&file, "other-token-0123456789 *\n").unwrap();
        access.reload();
        let old = access.check(Some(b"Bearer shop-token-0123456789"), NOBODY);
        assert_eq!(old, Err(Unauthenticated::UnknownToken));
        std::fs::write(&file, "short *\n").unwrap();
        access.reload();
        assert!(access.check(Some(b"Bearer other-token-0123456789"), NOBODY).is_ok());
    }
}
