"""Renders each folder of deploy/ with kubectl, and validates what is shipped for Kubernetes: against its own
schemas, and custom resources against those of their fields that are used here. kubernetes.py KUBECTL"""

import pathlib
import re
import subprocess
import sys
import tempfile

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
        duration=TEXT,
        privateKey=fields(algorithm={"enum": ["ECDSA"]}, size={"enum": [256]}),
        issuerRef=fields(["name"], name=TEXT),
    ),
}

# extensions.istio.io/v1alpha1, Istio 1.30: TrafficExtension; a WasmPlugin has the fields of `wasm` one level up.
TARGETS = {
    "type": "array",
    "minItems": 1,
    "items": fields(
        ["group", "kind", "name"],
        group={"const": "gateway.networking.k8s.io"},
        kind={"const": "Gateway"},
        name=TEXT,
    ),
}
SELECTION = dict(
    selector=fields(["matchLabels"], matchLabels={"type": "object", "additionalProperties": TEXT}),
    targetRefs=TARGETS,
    match={"type": "array", "items": fields(["mode"], mode={"enum": ["CLIENT", "SERVER", "CLIENT_AND_SERVER"]})},
)
WASM = dict(
    url={"type": "string", "pattern": "^(http|https|file|oci)://"},
    sha256={"type": "string", "pattern": "^$|^[a-f0-9]{64}$"},
    failStrategy={"enum": ["FAIL_CLOSE", "FAIL_OPEN", "FAIL_RELOAD"]},
    vmConfig=fields(
        ["env"],
        env={
            "type": "array",
            "items": fields(["name", "value"], name=TEXT, value={"type": "string", "maxLength": 2048}),
        },
    ),
    pluginConfig={"type": "object"},
)

# networking.istio.io: EnvoyFilter (v1alpha3), DestinationRule (v1).
SUB_FILTER = fields(
    filterChain=fields(filter=fields(["name"], name=TEXT, subFilter=fields(["name"], name=TEXT)))
)
ENVOY_FILTER = fields(
    ["configPatches"],
    workloadSelector=fields(["labels"], labels={"type": "object", "additionalProperties": TEXT}),
    targetRefs=TARGETS,
    configPatches={
        "type": "array",
        "minItems": 1,
        "items": fields(
            ["applyTo", "match", "patch"],
            applyTo={"enum": ["LISTENER", "NETWORK_FILTER", "HTTP_FILTER", "CLUSTER"]},
            match=fields(
                ["context"],
                context={"enum": ["SIDECAR_INBOUND", "SIDECAR_OUTBOUND", "GATEWAY"]},
                listener=SUB_FILTER,
                cluster=fields(["service"], service=TEXT),
            ),
            patch=fields(
                ["operation", "value"],
                operation={"enum": ["MERGE", "ADD", "INSERT_BEFORE"]},
                value={"type": "object"},
            ),
        ),
    },
)
DESTINATION_RULE = fields(
    ["host", "trafficPolicy"],
    host=TEXT,
    trafficPolicy=fields(
        ["tls"],
        tls=fields(
            ["mode"],
            mode={"enum": ["SIMPLE"]},
            sni=TEXT,
            subjectAltNames={"type": "array", "items": TEXT},
            caCertificates=TEXT,
        ),
    ),
)

# gateway.envoyproxy.io/v1alpha1.
EXTENSION_POLICY = fields(
    ["targetRefs", "wasm"],
    targetRefs=TARGETS,
    wasm={
        "type": "array",
        "items": fields(
            ["code"],
            name=TEXT,
            rootID=TEXT,
            code={
                "oneOf": [
                    fields(["type", "http"], type={"const": "HTTP"}, http=fields(["url"], url=WASM["url"], sha256=TEXT)),
                    fields(["type", "image"], type={"const": "Image"}, image=fields(["url"], url=TEXT, sha256=TEXT)),
                ]
            },
            env=fields(["hostKeys"], hostKeys={"type": "array", "items": TEXT}),
            config={"type": "object"},
        ),
    },
)
SECRET_KEY = fields(["name", "key"], name=TEXT, key=TEXT)
ENVOY_PROXY = fields(
    provider=fields(
        ["type", "kubernetes"],
        type={"const": "Kubernetes"},
        kubernetes=fields(
            envoyDeployment=fields(
                container=fields(
                    env={
                        "type": "array",
                        "items": fields(["name", "valueFrom"], name=TEXT, valueFrom=fields(secretKeyRef=SECRET_KEY)),
                    }
                )
            )
        ),
    ),
    bootstrap=fields(["type", "value"], type={"enum": ["Merge"]}, value=TEXT),
)

# monitoring.coreos.com/v1.
DURATION = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"}
RELABELINGS = {
    "type": "array",
    "items": fields(
        ["action"],
        action={"enum": ["keep", "drop", "replace"]},
        sourceLabels={"type": "array", "items": TEXT},
        regex=TEXT,
        targetLabel=TEXT,
        replacement=TEXT,
    ),
}
LABELS = fields(matchLabels={"type": "object", "additionalProperties": TEXT}, matchExpressions={"type": "array"})
ENDPOINT = dict(
    port=TEXT,
    path=TEXT,
    scheme={"enum": ["http", "https", "HTTP", "HTTPS"]},
    interval=DURATION,
    honorLabels={"type": "boolean"},
    authorization=fields(["credentials"], type={"const": "Bearer"}, credentials=SECRET_KEY),
    relabelings=RELABELINGS,
    metricRelabelings=RELABELINGS,
)
NAMESPACES = fields(any={"type": "boolean"}, matchNames={"type": "array", "items": TEXT})
SERVICE_MONITOR = fields(
    ["selector", "endpoints"],
    selector=LABELS,
    namespaceSelector=NAMESPACES,
    endpoints={"type": "array", "minItems": 1, "items": fields(["port"], **ENDPOINT)},
)
POD_MONITOR = fields(
    ["selector", "podMetricsEndpoints"],
    selector=LABELS,
    namespaceSelector=NAMESPACES,
    podMetricsEndpoints={"type": "array", "minItems": 1, "items": fields(**ENDPOINT)},
)
PROMETHEUS_RULE = fields(
    ["groups"],
    groups={
        "type": "array",
        "items": fields(
            ["name", "rules"],
            name=TEXT,
            rules={
                "type": "array",
                "items": fields(
                    ["alert", "expr"],
                    alert=TEXT,
                    expr=TEXT,
                    **{"for": DURATION},
                    labels={"type": "object", "additionalProperties": TEXT},
                    annotations={"type": "object", "additionalProperties": TEXT},
                ),
            },
        ),
    },
)

# The `spec` of each custom resource.
SPECS = {
    ("extensions.istio.io/v1alpha1", "TrafficExtension"): fields(
        ["wasm"], **SELECTION, wasm=fields(["url"], **WASM)
    ),
    ("extensions.istio.io/v1alpha1", "WasmPlugin"): fields(["url"], **SELECTION, **WASM),
    ("networking.istio.io/v1alpha3", "EnvoyFilter"): ENVOY_FILTER,
    ("networking.istio.io/v1", "DestinationRule"): DESTINATION_RULE,
    ("gateway.envoyproxy.io/v1alpha1", "EnvoyExtensionPolicy"): EXTENSION_POLICY,
    ("gateway.envoyproxy.io/v1alpha1", "EnvoyProxy"): ENVOY_PROXY,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): SERVICE_MONITOR,
    ("monitoring.coreos.com/v1", "PodMonitor"): POD_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PROMETHEUS_RULE,
    **{("cert-manager.io/v1", kind): spec for kind, spec in CERT_MANAGER.items()},
}
OBJECT = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion=TEXT,
    kind=TEXT,
    metadata=fields(
        ["name", "namespace"],
        name=TEXT,
        namespace=TEXT,
        labels={"type": "object"},
        annotations={"type": "object"},
    ),
    spec={"type": "object"},
)

VERSIONS = ["1.30", "1.35", "1.37"]
root = pathlib.Path(__file__).parent.parent
kubectl = sys.argv[1]
# What high-availability is rendered on, beside the base: as in tools/manifests.py.
BASES = "keda hpa hpa-cert-manager hpa-object".split()
checked = 0


def check(document, source):
    global checked
    kind = document["apiVersion"], document["kind"]
    if document["kind"] == "ScaledObject":
        jsonschema.validate(document, SCALED_OBJECT)
    elif document["kind"] == "ClusterTriggerAuthentication":
        jsonschema.validate(document, AUTHENTICATION)
    elif kind in SPECS:
        jsonschema.validate(document, OBJECT)
        jsonschema.validate(document["spec"], SPECS[kind])
        assert not {"selector", "targetRefs"} <= set(document["spec"]), document
    else:
        # `tolerance` came with 1.33.
        has_tolerance = "tolerance" in yaml.safe_dump(document)
        for version in VERSIONS[1:] if has_tolerance else VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    checked += 1
    print(f"{source}: {document['kind']} {document['metadata']['name']}")


def rendered():
    """Returns what kubectl makes of each folder of deploy/ that is a kustomization."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, root / "tools/manifests.py", kubectl, folder], check=True)
        files = sorted(pathlib.Path(folder).iterdir())
        return {file.stem: list(yaml.safe_load_all(file.read_text())) for file in files}


folders = rendered()
for name, documents in folders.items():
    for document in documents:
        check(document, name)
# Files that no kustomization includes: what one puts in another's place, or writes for each workload.
included = {
    (path.parent / resource).resolve()
    for path in (root / "deploy").glob("*/kustomization.yaml")
    for resource in yaml.safe_load(path.read_text())["resources"]
}
for path in sorted([*(root / "deploy").glob("*/*.yaml"), *(root / "envoy" / "istio").glob("*.yaml")]):
    if path.resolve() not in included and path.name != "kustomization.yaml":
        for document in yaml.safe_load_all(path.read_text()):
            # Patches have no kind.
            if isinstance(document, dict) and "kind" in document and "$patch" not in document:
                check(document, f"{path.parent.name}/{path.name}")


def statserver(name):
    """Checks what refers to another thing in a stats server's folder. Returns the objects, by kind and name."""
    named = {(d["kind"], d["metadata"]["name"]): d for d in folders[name]}
    pod = named["Deployment", "inflight-statserver"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert not any("subPath" in mount for mount in container["volumeMounts"])
    ports = {port["name"] for port in container["ports"]}
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for flag, value in (argument.split("=", 1) for argument in container["args"]):
        if value.startswith("/etc/"):
            assert any(value.startswith(mount + "/") for mount in mounts), f"{flag}: nothing is mounted at {value}"
    assert "--insecure" not in container["args"], container["args"]
    for (kind, _), document in named.items():
        if kind == "Service":
            assert {port["targetPort"] for port in document["spec"]["ports"]} <= ports, document
        if kind == "NetworkPolicy" and "Ingress" in document["spec"]["policyTypes"]:
            assert {p["port"] for rule in document["spec"]["ingress"] for p in rule["ports"]} <= ports, document
    policies = [d["spec"] for d in named.values() if d["kind"] == "NetworkPolicy"]
    admitted = [spec["ingress"] for spec in policies if "Ingress" in spec["policyTypes"]]
    admitted = {p["port"] for rules in admitted for rule in rules for p in rule["ports"]}
    assert admitted == ports, f"{name}: the NetworkPolicies admit {admitted} of {ports}"
    maps = [volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume]
    assert all(("ConfigMap", map) in named for map in maps), maps
    return named, pod, container


named, pod, base = statserver("base")
ports = named["Service", "inflight-statserver"]["spec"]["ports"]
assert pod["automountServiceAccountToken"] is False and ("ServiceAccount", pod["serviceAccountName"]) in named
named, _, container = statserver("keda")
# HTTP is what it is in the base: what reports over it need not change.
assert container["readinessProbe"] == base["readinessProbe"] and "--listen=[::]:8080" in container["args"]
assert not any(argument.startswith("--tls-") for argument in container["args"]), container["args"]
assert named["Service", "inflight-statserver"]["spec"]["ports"][0] == ports[0]
for folder in sorted(name for name in folders if name.startswith("hpa")):
    named, pod, container = statserver(folder)
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
    assert sorted(apis) == sorted(d["metadata"]["name"] for d in folders[folder] if d["kind"] == "APIService")
    for name in apis:
        spec = named["APIService", name]["spec"]
        assert name == f"{spec['version']}.{spec['group']}" and spec["service"]["name"] == "inflight-metrics"
        # By this label they are deleted, and nobody else's.
        assert named["APIService", name]["metadata"]["labels"] == {"app.kubernetes.io/name": "inflight-statserver"}
        assert ("caBundle" in spec) == (folder != "hpa-cert-manager"), spec
        annotations = named["APIService", name]["metadata"].get("annotations", {})
        injected = annotations.get("cert-manager.io/inject-ca-from")
        assert (injected == "inflight/inflight-metrics") == (folder == "hpa-cert-manager"), annotations
    if folder == "hpa-cert-manager":
        certificate = named["Certificate", "inflight-metrics"]["spec"]
        secrets = [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume]
        assert certificate["secretName"] in secrets and "inflight-metrics.inflight.svc" in certificate["dnsNames"]
    print(f"{folder} args: " + " ".join(a for a in container["args"] if a.startswith("--metrics-")))
# The flags that the server has, by its reference.
flags = set(re.findall("`(--[a-z-]+)`<br>", (root / "docs/statserver.md").read_text()))
variables = set(re.findall("<br>`(INFLIGHT_[A-Z_]+)`", (root / "docs/statserver.md").read_text()))
URL = re.compile(r"(redis://([a-z-]+)\.inflight:([0-9]+)/0)")
for folder in sorted(name for name in folders if name.startswith("high-availability")):
    on = folder.removeprefix("high-availability").removeprefix("-") or "base"
    named, pod, container = statserver(folder)
    alone, _, one = statserver(on)
    assert set(alone) | {("NetworkPolicy", "inflight-statserver-egress")} == set(named), set(named) ^ set(alone)
    # It adds to what it builds on, and takes nothing away.
    assert set(one["args"]) < set(container["args"]) and one["ports"] == container["ports"], container
    assert {argument.split("=")[0] for argument in container["args"]} <= flags, container["args"]
    assert {variable["name"] for variable in container["env"]} <= variables, container["env"]
    deployment = named["Deployment", "inflight-statserver"]["spec"]
    budget = named["PodDisruptionBudget", "inflight-statserver"]["spec"]
    assert deployment["replicas"] == 3 and budget["maxUnavailable"] == 1, (deployment, budget)
    assert deployment["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0},
    }, deployment
    # A drain, and --write-timeout, 20 s, for answers that are not read yet.
    assert pod["terminationGracePeriodSeconds"] >= 5 + 20 and "--drain-delay=5s" in container["args"]
    assert len(pod["topologySpreadConstraints"]) == 2, pod["topologySpreadConstraints"]
    # The Secret: its keys are those that the valkey.yaml takes, too.
    secret = {variable["name"]: variable["valueFrom"]["secretKeyRef"] for variable in container["env"]}
    assert secret == {"INFLIGHT_STORE": {"name": "inflight-store", "key": "url"}}, secret
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["store"]["secret"] == {"secretName": "inflight-store"}, volumes["store"]
    egress = named["NetworkPolicy", "inflight-statserver-egress"]["spec"]
    leave = {port["port"] for rule in egress["egress"] for port in rule["ports"]}
    assert {53, 6379, 26379, 443, 6443} <= leave and egress["policyTypes"] == ["Egress"], egress
path = root / "deploy/high-availability/valkey.yaml"
valkey = {d["kind"]: d for d in yaml.safe_load_all(path.read_text())}
pod = valkey["StatefulSet"]["spec"]["template"]["spec"]
labels = valkey["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
for selector in [valkey[kind]["spec"] for kind in ("StatefulSet", "Service", "NetworkPolicy")]:
    selector = selector.get("podSelector", selector.get("selector"))
    assert selector.get("matchLabels", selector).items() <= labels.items(), selector
assert {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"]} == {"store": "inflight-store"}
claims = {claim["metadata"]["name"] for claim in valkey["StatefulSet"]["spec"]["volumeClaimTemplates"]}
assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == claims | {"store"}
# The address that its comment and the document say is that of its Service.
urls = {found for file in (path, root / "docs/high-availability.md") for found in URL.findall(file.read_text())}
service = valkey["Service"]
port = service["spec"]["ports"][0]["port"]
assert {(name, int(number)) for _, name, number in urls} == {(service["metadata"]["name"], port)}, urls
settings = " ".join(pod["containers"][0]["command"])
for setting in ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction", "requirepass"):
    assert setting in settings, settings
expected = "base envoy-gateway hpa hpa-cert-manager hpa-object istio-gateway istio-sidecar keda monitoring".split()
expected += ["high-availability", *(f"high-availability-{on}" for on in BASES)]
assert sorted(folders) == sorted(expected), sorted(folders)
print(f"{checked} documents")
