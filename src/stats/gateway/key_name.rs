//! The name of a key at a gateway: a namespace and a name. It comes from the cluster that a request
//! goes to, or from two of the request's headers.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use crate::protocol::key_name;

/// A namespace and a name. Clones share the text.
pub type KeyName = key_name::KeyName<Rc<str>>;

/// The part of Istio's service host names that follows the namespace.
const SVC: &str = ".svc.";

impl KeyName {
    /// Returns the key of a request that goes to an Envoy cluster. `None` for names that no report
    /// could carry.
    ///
    /// | the cluster's name | the key |
    /// |---|---|
    /// | Istio's `outbound\|80\|\|svc.ns.svc.cluster.local` | `ns/svc` |
    /// | with a subset: `outbound\|80\|v2\|svc.ns.svc.cluster.local` | `ns/svc-v2` |
    /// | a waypoint's `inbound-vip\|80\|http\|svc.ns.svc.cluster.local`, `…\|http/v2\|…` | the same |
    /// | Envoy Gateway's `httproute/ns/route/rule/0`, `grpcroute/…`, also with `/backend/0` | `ns/route` |
    /// | any other | the name itself, in `namespace` |
    pub fn from_cluster(cluster: &str, namespace: &str) -> Option<Self> {
        match from_istio(cluster) {
            Some((namespace, service, "")) => Self::checked(namespace, service),
            Some((namespace, service, subset)) => Self::checked(namespace, &format!("{service}-{subset}")),
            None => {
                let (namespace, name) = from_envoy_gateway(cluster).unwrap_or((namespace, cluster));
                Self::checked(namespace, name)
            }
        }
    }

    /// Returns whether this is the key of a namespace and a name.
    pub fn is(&self, namespace: &str, name: &str) -> bool {
        (&*self.namespace, &*self.name) == (namespace, name)
    }

    /// Returns the number of the key's bucket, of so many buckets, by a hash that nobody can predict who
    /// does not know the secret.
    pub fn bucket(&self, secret: u64, buckets: u64) -> u64 {
        let mut hasher = DefaultHasher::new();
        (secret, self).hash(&mut hasher);
        hasher.finish() % buckets
    }

    /// Returns a key from two headers.
    pub fn checked(namespace: &str, name: &str) -> Option<Self> {
        let fits = crate::protocol::report::is_name;
        (fits(namespace) && fits(name)).then(|| Self { namespace: namespace.into(), name: name.into() })
    }
}

/// Returns the namespace, the service and the subset of Istio's `direction|port|…|host`.
fn from_istio(cluster: &str) -> Option<(&str, &str, &str)> {
    let mut parts = cluster.split('|');
    let (direction, Some(port), Some(third), Some(host), None) =
        (parts.next()?, parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let subset = match direction {
        "outbound" => third,
        // At a waypoint: the protocol, and the subset after a slash.
        "inbound-vip" => match third.strip_prefix("http")? {
            "" => "",
            rest => rest.strip_prefix('/')?,
        },
        _ => return None,
    };
    if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let (service, _domain) = host.split_once(SVC)?;
    let (name, namespace) = service.rsplit_once('.')?;
    Some((namespace, name, subset))
}

/// Returns the namespace and the name of the route of Envoy Gateway's `kind/ns/name/rule/n`, which
/// may have `/backend/m` behind it.
fn from_envoy_gateway(cluster: &str) -> Option<(&str, &str)> {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let mut parts = cluster.split('/');
    let (Some("httproute" | "grpcroute"), Some(namespace), Some(name), Some("rule"), Some(rule)) =
        (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let ends = match (parts.next(), parts.next(), parts.next()) {
        (None, ..) => true,
        (Some("backend"), Some(backend), None) => is_number(backend),
        _ => false,
    };
    (is_number(rule) && ends).then_some((namespace, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_of(cluster: &str) -> Option<(String, String)> {
        KeyName::from_cluster(cluster, "default").map(|key| (key.namespace.to_string(), key.name.to_string()))
    }

    #[test]
    fn istios_and_envoy_gateways_clusters_give_a_namespace_and_a_name_others_are_the_name() {
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(name_of("outbound|80||cart.shop.svc.cluster.local"), pair("shop", "cart"));
        assert_eq!(name_of("outbound|8080|v2|cart.shop.svc.example.org"), pair("shop", "cart-v2"));
        assert_eq!(name_of("inbound-vip|80|http|cart.shop.svc.cluster.local"), pair("shop", "cart"));
        assert_eq!(name_of("inbound-vip|80|http/v2|cart.shop.svc.cluster.local"), pair("shop", "cart-v2"));
        for route in ["httproute/shop/cart/rule/0", "grpcroute/shop/cart/rule/12/backend/3"] {
            assert_eq!(name_of(route), pair("shop", "cart"));
        }
        for other in [
            "app",
            "outbound|80||example.org",
            "outbound|x||a.b.svc.c",
            "inbound|80||a.b.svc.c",
            "outbound|80||a.svc.c",
            "outbound|80||a.b.svc.c|x",
            "inbound-vip|80|tcp|a.b.svc.c",
            "inbound-vip|80|https|a.b.svc.c",
            "tlsroute/a/b/rule/0",
            "httproute/a/b/rule/x",
            "httproute/a/b/rule/",
            "httproute/a/b",
            "httproute/a/b/rule/0/backend",
            "httproute/a/b/rule/0/backend/1/x",
        ] {
            assert_eq!(name_of(other), pair("default", other));
        }
        assert_eq!(name_of(""), None);
        assert_eq!(name_of("outbound|80||.b.svc.c"), None);
        assert_eq!(name_of("httproute//b/rule/0"), None);
        assert_eq!(name_of("a\nb"), None);
        assert_eq!(KeyName::from_cluster("app", ""), None);
    }
}
