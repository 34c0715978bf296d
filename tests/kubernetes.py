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

VERSIONS = ["1.30", "1.35"]
folder = pathlib.Path(__file__).parent.parent / "envoy" / "kubernetes"
checked = 0
for path in sorted(folder.glob("*.yaml")):
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] == "ScaledObject":
            jsonschema.validate(document, SCALED_OBJECT)
        elif document["kind"] == "ClusterTriggerAuthentication":
            jsonschema.validate(document, AUTHENTICATION)
        else:
            for version in VERSIONS:
                kubernetes_validate.validate(document, version, strict=True)
        checked += 1
        print(f"{path.name}: {document['kind']} {document['metadata']['name']}")
sys.exit(0 if checked == 12 else f"{checked} documents, expected 12")
