//! The name of a key at a gateway: a namespace and a name. It comes from the cluster that a request
//! goes to, or from two of the request's headers.

use std::rc::Rc;

use crate::protocol::key_name;

/// A namespace and a name. Clones share the text.
pub type KeyName = key_name::KeyName<Rc<str>>;

/// The part of Istio's service host names that follows the namespace.
const SVC: &str = ".svc.";

impl KeyName {
    /// Returns the key of a request that goes to an Envoy cluster. Istio's
    /// `outbound|80|subset|svc.ns.svc.cluster.local` (the subset may be empty) gives the namespace
    /// and the service. Any other cluster name is the key's name, in `namespace`. Returns `None`
    /// for names that no report could carry.
    pub fn from_cluster(cluster: &str, namespace: &str) -> Option<Self> {
        let (namespace, name) = from_istio(cluster).unwrap_or((namespace, cluster));
        Self::checked(namespace, name)
    }

    /// Returns a key from two headers.
    pub fn checked(namespace: &str, name: &str) -> Option<Self> {
        let fits = crate::protocol::report::is_name;
        (fits(namespace) && fits(name)).then(|| Self { namespace: namespace.into(), name: name.into() })
    }
}

fn from_istio(cluster: &str) -> Option<(&str, &str)> {
    let mut parts = cluster.split('|');
    let ("outbound", Some(port), Some(_subset), Some(host), None) =
        (parts.next()?, parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let (service, _domain) = host.split_once(SVC)?;
    let (name, namespace) = service.rsplit_once('.')?;
    Some((namespace, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_of(cluster: &str) -> Option<(String, String)> {
        KeyName::from_cluster(cluster, "default").map(|key| (key.namespace.to_string(), key.name.to_string()))
    }

    #[test]
    fn istios_clusters_give_namespace_and_service_others_are_the_name() {
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(name_of("outbound|80||cart.shop.svc.cluster.local"), pair("shop", "cart"));
        assert_eq!(name_of("outbound|8080|v2|cart.shop.svc.example.org"), pair("shop", "cart"));
        for other in [
            "app",
            "outbound|80||example.org",
            "outbound|x||a.b.svc.c",
            "inbound|80||a.b.svc.c",
            "outbound|80||a.svc.c",
            "outbound|80||a.b.svc.c|x",
        ] {
            assert_eq!(name_of(other), pair("default", other));
        }
        assert_eq!(name_of(""), None);
        assert_eq!(name_of("outbound|80||.b.svc.c"), None);
        assert_eq!(name_of("a\nb"), None);
        assert_eq!(KeyName::from_cluster("app", ""), None);
    }
}
