//! Who may do what: bearer tokens out of a file, each good for some namespaces; and whoever has a certificate.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use subtle::{Choice, ConstantTimeEq};
use tracing::{error, info};

use crate::files;
use crate::link::Peer;

/// The most tokens in the file.
const MOST: usize = 10_000;
const MOST_BYTES: u64 = 4 << 20;
/// Shorter ones can be guessed.
const SHORTEST: usize = 16;
const LONGEST: usize = 4096;

/// What somebody may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// For these namespaces; `None`: for all.
    namespaces: Option<Arc<[String]>>,
    /// Also tell keys what they are scaled by.
    pub admin: bool,
}

impl Grant {
    /// Without tokens everybody may do everything: the listener is a loopback one, or whoever started this said so.
    const ALL: Self = Self { namespaces: None, admin: true };
    /// Whoever shows a certificate reports and asks for every namespace. What keys are scaled by is a token's to tell.
    const CERTIFIED: Self = Self { namespaces: None, admin: false };

    /// Whether it is good for a namespace.
    pub fn covers(&self, namespace: &str) -> bool {
        self.namespaces.as_ref().is_none_or(|namespaces| namespaces.iter().any(|own| own == namespace))
    }
}

/// No token, or none of those in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unknown;

struct Token {
    secret: Box<[u8]>,
    grant: Grant,
}

/// The tokens, as the file has them now.
pub struct Access {
    file: Option<PathBuf>,
    /// Whether a certificate lets somebody in.
    certificates: bool,
    tokens: RwLock<(Vec<u8>, Arc<[Token]>)>,
}

/// A line that is no token. It does not show the line: that may hold a secret.
#[derive(Debug, PartialEq, Eq)]
pub struct BadLine(usize, &'static str);

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(line, reason) = self;
        write!(f, "line {line}: {reason}; allowed is `TOKEN NAMESPACES [admin]`")
    }
}

impl Access {
    /// Reads the file, if there is one. With neither that nor `certificates` everybody may do everything.
    ///
    /// # Errors
    /// In one line, without a secret.
    pub fn load(file: Option<&Path>, certificates: bool) -> Result<Self, String> {
        let tokens = match file {
            None => (Vec::new(), Arc::default()),
            Some(path) => {
                read(path).map_err(|reason| format!("--token-file {}: {reason}", path.display()))?
            }
        };
        Ok(Self { file: file.map(Path::to_owned), certificates, tokens: RwLock::new(tokens) })
    }

    /// Takes over what the file says now. A file that is wrong changes nothing.
    pub fn reload(&self) {
        let Some(path) = &self.file else { return };
        match read(path) {
            Err(reason) => error!(file = %path.display(), reason, "the tokens stay as they were"),
            Ok(new) => {
                let mut tokens = self.tokens.write().unwrap_or_else(PoisonError::into_inner);
                if tokens.0 != new.0 {
                    info!(file = %path.display(), tokens = new.1.len(), "the tokens have changed");
                    *tokens = new;
                }
            }
        }
    }

    /// What the value of an `authorization` header allows: `Bearer TOKEN`, or `Basic` with the token as the password,
    /// which is what a browser can send; and without one, a certificate. Every token is compared, each in constant time.
    ///
    /// # Errors
    /// [`Unknown`].
    pub fn check(&self, authorization: Option<&[u8]>, peer: Peer) -> Result<Grant, Unknown> {
        let is_certified = self.certificates && peer.certified;
        match (&self.file, authorization) {
            (None, _) if !self.certificates => return Ok(Grant::ALL),
            (None, _) | (Some(_), None) => {
                return if is_certified { Ok(Grant::CERTIFIED) } else { Err(Unknown) };
            }
            // A token that is shown must be right, also beside a certificate.
            (Some(_), Some(_)) => {}
        }
        let secret = authorization.and_then(secret).ok_or(Unknown)?;
        let tokens = Arc::clone(&self.tokens.read().unwrap_or_else(PoisonError::into_inner).1);
        let mut found = None;
        for token in tokens.iter() {
            let same: Choice = token.secret.ct_eq(&secret);
            if bool::from(same) {
                found = Some(token.grant.clone());
            }
        }
        found.ok_or(Unknown)
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
    let bytes = files::read(path, MOST_BYTES).map_err(|error| error.to_string())?;
    let tokens = parse(&bytes).map_err(|bad| bad.to_string())?;
    if tokens.is_empty() {
        return Err("no token in it".into());
    }
    Ok((bytes, tokens.into()))
}

fn parse(bytes: &[u8]) -> Result<Vec<Token>, BadLine> {
    let mut tokens = Vec::new();
    for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let bad = |reason| BadLine(number, reason);
        let line = std::str::from_utf8(line).map_err(|_| bad("not UTF-8"))?.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split_ascii_whitespace();
        let (Some(secret), Some(namespaces)) = (words.next(), words.next()) else {
            return Err(bad("no namespaces"));
        };
        let admin = match (words.next(), words.next()) {
            (None, None) => false,
            (Some("admin"), None) => true,
            _ => return Err(bad("more words than known")),
        };
        if !(SHORTEST..=LONGEST).contains(&secret.len()) {
            return Err(bad("a token has from 16 to 4096 bytes"));
        }
        let namespaces = match namespaces {
            "*" => None,
            list => Some(list.split(',').map(str::to_owned).collect::<Vec<_>>().into()),
        };
        if tokens.len() == MOST {
            return Err(bad("more than 10,000 tokens"));
        }
        tokens.push(Token { secret: secret.as_bytes().into(), grant: Grant { namespaces, admin } });
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str =
        "# who may report\nshop-token-0123456789 shop,cart\n\n  root-token-0123456789   *  admin \n";

    const NOBODY: Peer = Peer { certified: false };
    const CERTIFIED: Peer = Peer { certified: true };

    #[test]
    fn a_certificate_is_good_for_every_namespace_and_for_no_settings() {
        let (folder, _) = access(FILE);
        let file = folder.path().join("tokens");
        for file in [None, Some(&*file)] {
            let access = Access::load(file, true).unwrap();
            assert_eq!(access.check(None, NOBODY), Err(Unknown));
            let grant = access.check(None, CERTIFIED).unwrap();
            assert_eq!((grant.covers("anything"), grant.admin), (true, false));
        }
        let both = Access::load(Some(&file), true).unwrap();
        assert_eq!(both.check(Some(b"Bearer wrong-wrong-wrong-wrong"), CERTIFIED), Err(Unknown));
        assert!(!both.check(Some(b"Bearer shop-token-0123456789"), CERTIFIED).unwrap().covers("other"));
        // A certificate that nobody asked for is none.
        let tokens = Access::load(Some(&file), false).unwrap();
        assert_eq!(tokens.check(None, CERTIFIED), Err(Unknown));
    }

    fn access(text: &str) -> (tempfile::TempDir, Result<Access, String>) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokens");
        std::fs::write(&file, text).unwrap();
        let access = Access::load(Some(&file), false);
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
        for wrong in [
            &b"Bearer shop-token-012345678"[..],
            b"Bearer",
            b"Bearer ",
            b"Basic !!!",
            b"Basic YWJj",
            b"",
            b"\xff \xff",
        ] {
            assert_eq!(access.check(Some(wrong), NOBODY), Err(Unknown), "{wrong:?}");
        }
        assert_eq!(access.check(None, NOBODY), Err(Unknown));
    }

    #[test]
    fn without_a_file_everybody_may() {
        assert_eq!(Access::load(None, false).unwrap().check(None, NOBODY), Ok(Grant::ALL));
    }

    #[test]
    fn a_wrong_file_is_refused_without_its_secrets() {
        for (text, reason) in [
            ("secret-secret-secret", "line 1: no namespaces"),
            ("\nsecret *", "line 2: a token has from 16"),
            ("secret-secret-secret * root", "more words"),
            ("# nothing\n", "no token in it"),
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
        assert_eq!(access.check(Some(b"Bearer shop-token-0123456789"), NOBODY), Err(Unknown));
        std::fs::write(&file, "short *\n").unwrap();
        access.reload();
        assert!(access.check(Some(b"Bearer other-token-0123456789"), NOBODY).is_ok());
    }
}
