"""Drives the stats server's gRPC as KEDA does, by Python's grpcio and the .proto: keda.py ADDRESS PROTO [CA CERTIFICATE KEY]."""

import json
import pathlib
import sys
import tempfile

import grpc
from grpc_tools import protoc

address, proto = sys.argv[1], pathlib.Path(sys.argv[2])
with tempfile.TemporaryDirectory() as folder:
    made = protoc.main(["", f"-I{proto.parent}", f"--python_out={folder}", f"--grpc_python_out={folder}", proto.name])
    assert made == 0, "protoc"
    sys.path.insert(0, folder)
    import externalscaler_pb2 as messages
    import externalscaler_pb2_grpc as services

    known = messages.ScaledObjectRef(name="rev", namespace="ns", scalerMetadata={"target": "2.5", "scalerAddress": "x"})
    unknown = messages.ScaledObjectRef(name="nobody", namespace="ns")
    if files := [pathlib.Path(file).read_bytes() for file in sys.argv[3:]]:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(files[0], files[2], files[1]))
    else:
        channel = grpc.insecure_channel(address)
    with channel:
        scaler = services.ExternalScalerStub(channel)
        ask = {"timeout": 10}
        spec = scaler.GetMetricSpec(known, **ask).metricSpecs[0]
        value = scaler.GetMetrics(messages.GetMetricsRequest(scaledObjectRef=known, metricName=spec.metricName), **ask)
        active = scaler.StreamIsActive(known, **ask)
        specs = scaler.StreamMetricSpec(known, **ask)

        def refusal(call, message):
            try:
                return str(call(message, **ask))
            except grpc.RpcError as error:
                return f"{error.code().name}: {error.details()}"

        def rev(**metadata):
            return messages.ScaledObjectRef(name="rev", namespace="ns", scalerMetadata=metadata)

        desired = scaler.GetMetricSpec(rev(metric="desired_pods"), **ask).metricSpecs[0]
        pods = scaler.GetMetrics(messages.GetMetricsRequest(scaledObjectRef=rev(metric="desired_pods")), **ask)
        print(json.dumps({
            "is_active": scaler.IsActive(known, **ask).result,
            "stream_is_active": next(active).result,
            "metric": spec.metricName,
            "target": spec.targetSizeFloat,
            "target_rounded": spec.targetSize,
            "stream_target": next(specs).metricSpecs[0].targetSizeFloat,
            "value": value.metricValues[0].metricValueFloat,
            "unknown_active": refusal(scaler.IsActive, unknown),
            "unknown_value": refusal(scaler.GetMetrics, messages.GetMetricsRequest(scaledObjectRef=unknown)),
            "desired_metric": desired.metricName,
            "desired_target": desired.targetSizeFloat,
            "desired": pods.metricValues[0].metricValueFloat,
            "refused": refusal(scaler.GetMetricSpec, rev(target="many")),
            "misspelt": refusal(scaler.GetMetricSpec, rev(tarjet="1")),
        }))
        active.cancel()
        specs.cancel()
