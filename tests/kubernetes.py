"""Validates envoy/kubernetes against the schemas of Kubernetes, and a ScaledObject against KEDA's fields."""

import pathlib
import sys

import jsonschema
import kubernetes_validate
import yaml

TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}


def fields(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# keda.sh/v1alpha1: the fields that KEDA's operator reads. Every metadata value is a string.
SCALED_OBJECT = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "keda.sh/v1alpha1"},
    kind={"const": "ScaledObject"},
    metadata=fields(["name"], name=TEXT, namespace=TEXT, labels={"type": "object"}, annotations={"type": "object"}),
    spec=fields(
        ["scaleTargetRef", "triggers"],
        scaleTargetRef=fields(["name"], name=TEXT, apiVersion=TEXT, kind=TEXT, envSourceContainerName=TEXT),
        pollingInterval=COUNT,
        cooldownPeriod=COUNT,
        initialCooldownPeriod=COUNT,
        idleReplicaCount=COUNT,
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        fallback={"type": "object"},
        advanced={"type": "object"},
        triggers={
            "type": "array",
            "minItems": 1,
            "items": fields(
                ["type", "metadata"],
                type={"enum": ["external", "external-push"]},
                name=TEXT,
                metadata={"type": "object", "required": ["scalerAddress"], "additionalProperties": TEXT},
                metricType={"enum": ["AverageValue", "Value"]},
                useCachedMetrics={"type": "boolean"},
                authenticationRef=fields(["name"], name=TEXT, kind=TEXT),
            ),
        },
    ),
)

# The same for the credentials that the operator presents to a scaler.
AUTHENTICATION = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "keda.sh/v1alpha1"},
    kind={"const": "ClusterTriggerAuthentication"},
    metadata=fields(["name"], name=TEXT),
    spec=fields(
        ["secretTargetRef"],
        secretTargetRef={
            "type": "array",
            "minItems": 1,
            "items": fields(
                ["parameter", "name", "key"],
                parameter={"enum": ["caCert", "tlsClientCert", "tlsClientKey"]},
                name=TEXT,
                key=TEXT,
            ),
        },
    ),
)

# cert-manager.io/v1: the fields that it reads of what is shipped.
CERT_MANAGER = {
    "Issuer": fields(selfSigned={"type": "object", "maxProperties": 0}, ca=fields(["secretName"], secretName=TEXT)),
    "Certificate": fields(
        ["secretName", "issuerRef"],
        secretName=TEXT,
        isCA={"type": "boolean"},
        commonName=TEXT,
        dnsNames={"type": "array", "items": TEXT},
        privateKey=fields(algorithm={"enum": ["ECDSA"]}, size={"enum": [256]}),
        issuerRef=fields(["name"], name=TEXT),
    ),
}

VERSIONS = ["1.30", "1.35", "1.37"]
root = pathlib.Path(__file__).parent.parent
checked = 0


def check(document, source):
    global checked
    if document["kind"] == "ScaledObject":
        jsonschema.validate(document, SCALED_OBJECT)
    elif document["kind"] == "ClusterTriggerAuthentication":
        jsonschema.validate(document, AUTHENTICATION)
    elif document["apiVersion"] == "cert-manager.io/v1":
        jsonschema.validate(document["spec"], CERT_MANAGER[document["kind"]])
    else:
        # `tolerance` came with 1.33.
        has_tolerance = "tolerance" in yaml.safe_dump(document)
        for version in VERSIONS[1:] if has_tolerance else VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    checked += 1
    print(f"{source}: {document['kind']} {document['metadata']['name']}")


def patched(document, operations):
    """Applies a JSON patch of what is used here: add and replace."""
    for operation in operations:
        *way, last = operation["path"].strip("/").split("/")
        place = document
        for step in way:
            place = place[int(step) if isinstance(place, list) else step]
        if isinstance(place, list):
            assert (operation["op"], last) == ("add", "-"), operation
            place.append(operation["value"])
        else:
            assert (last in place) == (operation["op"] == "replace"), operation
            place[last] = operation["value"]


def built(folder):
    """Returns what `kustomize build` makes of a folder."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "patches"}, kustomization
    documents = []
    for resource in kustomization["resources"]:
        path = (folder / resource).resolve()
        assert path not in folder.resolve().parents, f"{folder}: a cycle, to kustomize"
        documents += built(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in kustomization.get("patches", []):
        target = patch["target"]
        meant = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (target["kind"], target["name"])]
        assert len(meant) == 1, patch
        change = yaml.safe_load((folder / patch["path"]).read_text())
        if isinstance(change, list):
            patched(meant[0], change)
        else:
            assert change["$patch"] == "delete" and change["metadata"] == meant[0]["metadata"], patch
            documents.remove(meant[0])
    return documents


for path in sorted((root / "envoy" / "kubernetes").glob("*.yaml")):
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] != "Kustomization":
            check(document, path.name)
for folder in ["hpa", "hpa-cert-manager", "hpa-object"]:
    documents = built(root / "deploy" / folder)
    for document in documents:
        check(document, folder)
    named = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    pod = named["Deployment", "inflight-statserver"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    # What names another thing names one that is there.
    account = named["ServiceAccount", pod["serviceAccountName"]]
    assert pod["automountServiceAccountToken"] and account["metadata"]["namespace"] == "inflight"
    subject = named["RoleBinding", "inflight-statserver-auth-reader"]["subjects"][0]
    assert subject["name"] == pod["serviceAccountName"], subject
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    target = named["Service", "inflight-metrics"]["spec"]["ports"][0]["targetPort"]
    assert target in [port["name"] for port in container["ports"]], target
    apis = ["v1beta2.custom.metrics.k8s.io"]
    if folder != "hpa-object":
        apis.append("v1beta1.external.metrics.k8s.io")
    assert sorted(apis) == sorted(d["metadata"]["name"] for d in documents if d["kind"] == "APIService")
    for name in apis:
        spec = named["APIService", name]["spec"]
        assert name == f"{spec['version']}.{spec['group']}" and spec["service"]["name"] == "inflight-metrics"
        annotations = named["APIService", name]["metadata"].get("annotations", {})
        injected = annotations.get("cert-manager.io/inject-ca-from")
        assert (injected == "inflight/inflight-metrics") == (folder == "hpa-cert-manager"), annotations
    if folder == "hpa-cert-manager":
        certificate = named["Certificate", "inflight-metrics"]["spec"]
        secrets = [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume]
        assert certificate["secretName"] in secrets and "inflight-metrics.inflight.svc" in certificate["dnsNames"]
    print(f"{folder} args: " + " ".join(a for a in container["args"] if a.startswith("--metrics-")))
sys.exit(0 if checked == 51 else f"{checked} documents, expected 51")
