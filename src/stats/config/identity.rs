//! Who an Envoy serves.

/// Names of the workload that an Envoy stands in front of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The Kubernetes namespace.
    pub namespace: String,
    /// The service, for labels.
    pub service: String,
    /// Knative's configuration, for labels.
    pub configuration: String,
    /// The revision: the name under which the workload is scaled.
    pub revision: String,
    /// The pod's name.
    pub pod: String,
}

const KNATIVE: &str = "serving.knative.dev";
const ISTIO: &str = "service.istio.io";
/// Istio's canonical revision of a workload that has no version.
const NO_REVISION: &str = "latest";

impl Identity {
    /// What Istio's node metadata says; `metadata` reads the value at a path, empty if there is
    /// none.
    ///
    /// The revision must tell workloads of a namespace apart. Knative's label does. Istio's
    /// canonical revision is only a version (`v1`, `latest`), unless Knative set it to the
    /// revision's name: so it counts together with the canonical name, and without a version the
    /// workload's name is taken.
    pub fn from_istio(metadata: impl Fn(&[&str]) -> String) -> Self {
        let label = |domain: &str, name: &str| metadata(&["LABELS", &format!("{domain}/{name}")]);
        let workload = metadata(&["WORKLOAD_NAME"]);
        let (name, version) = (label(ISTIO, "canonical-name"), label(ISTIO, "canonical-revision"));
        let canonical = match version.as_str() {
            "" | NO_REVISION => String::new(),
            version if name.is_empty() || version.starts_with(&format!("{name}-")) => version.to_owned(),
            version => format!("{name}-{version}"),
        };
        Self {
            namespace: metadata(&["NAMESPACE"]),
            revision: first([label(KNATIVE, "revision"), canonical, workload.clone(), name.clone()]),
            service: first([label(KNATIVE, "service"), name, workload]),
            configuration: label(KNATIVE, "configuration"),
            pod: metadata(&["NAME"]),
        }
    }
}

fn first<const N: usize>(values: [String; N]) -> String {
    values.into_iter().find(|value| !value.is_empty()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(metadata: &[(&str, &str)]) -> (String, String) {
        let identity = Identity::from_istio(|path| {
            let path = path.join("/");
            metadata
                .iter()
                .find(|(key, _)| *key == path)
                .map(|(_, value)| (*value).into())
                .unwrap_or_default()
        });
        (identity.service, identity.revision)
    }

    fn both(service: &str, revision: &str) -> (String, String) {
        (service.into(), revision.into())
    }

    const NAME: &str = "LABELS/service.istio.io/canonical-name";
    const REVISION: &str = "LABELS/service.istio.io/canonical-revision";

    #[test]
    fn a_version_counts_together_with_its_service() {
        assert_eq!(identity(&[(NAME, "reviews"), (REVISION, "v2")]), both("reviews", "reviews-v2"));
    }

    #[test]
    fn a_revision_that_knative_named_stands_for_itself() {
        assert_eq!(identity(&[(NAME, "hello"), (REVISION, "hello-00001")]), both("hello", "hello-00001"));
        let label = ("LABELS/serving.knative.dev/revision", "hello-00002");
        assert_eq!(identity(&[(NAME, "hello"), (REVISION, "v1"), label]), both("hello", "hello-00002"));
    }

    #[test]
    fn without_a_version_the_workload_is_the_revision() {
        let workload = ("WORKLOAD_NAME", "cart-deployment");
        assert_eq!(
            identity(&[(NAME, "cart"), (REVISION, "latest"), workload]),
            both("cart", "cart-deployment")
        );
        assert_eq!(identity(&[workload]), both("cart-deployment", "cart-deployment"));
        assert_eq!(identity(&[(NAME, "cart")]), both("cart", "cart"));
        assert_eq!(identity(&[]), both("", ""));
    }
}
