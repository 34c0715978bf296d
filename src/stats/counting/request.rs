//! How a single request counts: as a probe, as proxied, under which code.

/// The header whose presence marks a kubelet probe (knative/pkg, `network`).
pub const KUBELET_PROBE_HEADER: &str = "k-kubelet-probe";
/// The header whose presence marks a probe of Knative's own network layer.
pub const NETWORK_PROBE_HEADER: &str = "k-network-probe";
/// The value of that header by which Knative's activator asks queue-proxy whether the app is ready.
/// (knative/networking, `pkg/http/header`).
pub const QUEUE_PROBE_VALUE: &str = "queue";
/// The header of the probes by which Knative's ingress controller finds out that a gateway has its
/// latest routes.
pub const NETWORK_HASH_HEADER: &str = "k-network-hash";
/// The beginning of a kubelet's User-Agent.
pub const KUBE_PROBE_AGENT_PREFIX: &[u8] = b"kube-probe/";
/// The value of the proxied header that makes a request a proxied one.
pub const PROXIED_VALUE: &[u8] = b"activator";

/// Returns whether a User-Agent is the kubelet's.
pub fn is_kubelet_agent(user_agent: &[u8]) -> bool {
    user_agent.starts_with(KUBE_PROBE_AGENT_PREFIX)
}

/// Header in which a gateway names the key that it counted a request under: `NAMESPACE/NAME`.
pub const KEY_HEADER: &str = "x-inflight-key";

/// Whether a proxy in front of the pod has already counted the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// No proxy has.
    Direct,
    /// An activator or a gateway has.
    Proxied,
}

impl Origin {
    /// Returns the origin of a request by its proxied header and its [`KEY_HEADER`]. Whoever counted
    /// the request under another key than `own_key` did not count it for this pod: then nothing may
    /// be subtracted here. Knative's activator names no key.
    pub fn from_headers(proxied: Option<&[u8]>, key: Option<&[u8]>, own_key: &str) -> Self {
        let counted_here = key.is_none_or(|key| key == own_key.as_bytes());
        if proxied == Some(PROXIED_VALUE) && counted_here { Self::Proxied } else { Self::Direct }
    }
}

/// Returns whether a network probe is one that a gateway in front of Knative's revisions passes on.
/// It passes on only the probes of the ingress controller, which check whether its routes are in
/// force. Anything else that a client calls a probe is an ordinary request.
pub fn is_routing_probe(network_probe: &[u8], has_hash: bool) -> bool {
    network_probe == b"probe" && has_hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubelet_is_told_by_the_beginning_of_its_agent() {
        assert!(is_kubelet_agent(b"kube-probe/1.33"));
        assert!(!is_kubelet_agent(b"kube-probe"));
        assert!(!is_kubelet_agent(b"my kube-probe/1.33"));
        assert!(!is_kubelet_agent(b"\xff\xfe"));
    }

    #[test]
    fn only_the_activators_value_and_no_other_key_make_a_request_proxied() {
        let origin = |proxied: &'static [u8], key: Option<&'static [u8]>| {
            Origin::from_headers(Some(proxied), key, "ns/web")
        };
        assert_eq!(origin(b"activator", None), Origin::Proxied);
        assert_eq!(origin(b"activator", Some(b"ns/web")), Origin::Proxied);
        assert_eq!(origin(b"activator", Some(b"ns/web-v2")), Origin::Direct);
        assert_eq!(origin(b"activator", Some(b"")), Origin::Direct);
        assert_eq!(origin(b"Activator", Some(b"ns/web")), Origin::Direct);
        assert_eq!(origin(b"", None), Origin::Direct);
        assert_eq!(Origin::from_headers(None, Some(b"ns/web"), "ns/web"), Origin::Direct);
    }

    #[test]
    fn a_routing_probe_has_its_value_and_a_hash() {
        assert!(is_routing_probe(b"probe", true));
        assert!(!is_routing_probe(b"probe", false));
        assert!(!is_routing_probe(b"queue", true));
        assert!(!is_routing_probe(b"Probe", true));
        assert!(!is_routing_probe(b"", true));
    }
}
