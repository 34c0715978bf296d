"""Asks running servers for everything in docs/openapi.yaml, and checks each answer against it.

openapi.py OPEN WITH_TOKENS READ_ONLY: the addresses of three stats servers, of which the first hands
out a module, the second takes the tokens `admin-of-all-012345` and, for another namespace,
`elsewhere-0123456789`, and the third has a read-only settings file.
"""

import http.client
import json
import pathlib
import struct
import sys
import time

import jsonschema
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())
METHODS = ["GET", "PUT", "POST", "DELETE", "PATCH"]
TOKEN, ELSEWHERE = "admin-of-all-012345", "elsewhere-0123456789"
# What takes a client that is slow, or thousands of them; limits.rs, attacks.rs and disk.rs have them.
NOT_ASKED_FOR = {"503", "507"}

OPEN, WITH_TOKENS, READ_ONLY = sys.argv[1:]


def report(second, requests):
    """Returns a report of the key ns/rev, as docs/report-format.md has it."""
    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    def snapshot(second, requests):
        return struct.pack("<QQQ", second * 10**9, requests, 0) + bytes(32) + struct.pack("<II", 0, 0)

    head = b"\x01" + text("pod") + struct.pack("<QQ", 1, 1)
    return head + text("ns") + text("rev") + b"\x00" + snapshot(1, 0) + snapshot(second, requests)


REPORT, DECREASED = report(2, 7), report(3, 5)


def resolve(value):
    """Returns what a reference stands for."""
    while "$ref" in value:
        found = DOCUMENT
        for part in value["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        value = found
    return value


def schema_of(value):
    """Returns a schema with the document's others beside it, for its references."""
    return {**value, "components": DOCUMENT["components"]}


def ask(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(server, timeout=10)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    answer_body = answer.read()
    connection.close()
    return answer.status, answer.headers, answer_body


def names(path):
    """Returns a template with the key of the report in it."""
    path = path.replace("{namespace}", "ns").replace("{name}", "rev")
    return path + "?namespace=ns&name=rev" if path.startswith("/v1/key/") or path == "/v1/key" else path


seen = set()


def check(expected, server, method, template, *, path=None, body=None, headers=None):
    """Asks, and compares the answer with the document."""
    path = path or names(template)
    status, given, content = ask(server, method, path, body, headers)
    where = f"{method} {path}: {status} {content[:300]!r}"
    assert status == expected, f"{where}; expected {expected}"
    responses = DOCUMENT["paths"][template][method.lower()]["responses"]
    assert str(status) in responses, f"{where}: no such answer in the document"
    response = resolve(responses[str(status)])
    for name, header in response.get("headers", {}).items():
        assert name in given or not header.get("required"), f"{where}: no {name}"
        jsonschema.validate(given[name], schema_of(header["schema"]))
    contents = response.get("content", {})
    if not contents:
        assert content == b"", where
    else:
        content_type = given["content-type"]
        assert content_type in contents, f"{where}: {content_type} is not in {list(contents)}"
        schema = contents[content_type].get("schema")
        if schema is not None:
            value = json.loads(content) if content_type == "application/json" else content.decode()
            jsonschema.Draft202012Validator(schema_of(schema)).validate(value)
    seen.add((template, method, str(status)))
    return content


def token(value):
    return {"authorization": f"Bearer {value}"}


BINCODE = {"content-type": "application/x-bincode"}
KEYED = [path for path in DOCUMENT["paths"] if path.startswith("/v1/key/") or path == "/v1/key" or "{name}" in path]
SETTINGS = [path for path in KEYED if path.endswith("/settings")]
PUBLIC = ["/healthz", "/readyz", "/module/inflight_filter.wasm", "/module/sha256"]
SUCCESS = {"DELETE": 204}

check(202, OPEN, "POST", "/v1/reports", body=REPORT, headers=BINCODE)
check(400, OPEN, "POST", "/v1/reports", body=b"\x02", headers=BINCODE)
check(413, OPEN, "POST", "/v1/reports", body=bytes(1_048_577), headers=BINCODE)
check(415, OPEN, "POST", "/v1/reports", body=REPORT, headers={"content-type": "text/plain"})
check(409, OPEN, "POST", "/v1/reports", body=DECREASED, headers=BINCODE)
check(401, WITH_TOKENS, "POST", "/v1/reports", body=REPORT, headers=BINCODE)
check(403, WITH_TOKENS, "POST", "/v1/reports", body=REPORT, headers={**BINCODE, **token(ELSEWHERE)})
check(202, WITH_TOKENS, "POST", "/v1/reports", body=REPORT, headers={**BINCODE, **token(TOKEN)})

# Before the first decision and after it, when the history has a point.
check(200, OPEN, "GET", "/v1/keys")
deadline = time.monotonic() + 30
while not json.loads(ask(OPEN, "GET", "/v1/keys/ns/rev/history")[2])["points"]:
    assert time.monotonic() < deadline, "no decision within 30 s"
    time.sleep(0.1)

for template, item in DOCUMENT["paths"].items():
    for method in METHODS:
        if method.lower() not in item:
            status, headers, content = ask(OPEN, method, names(template))
            assert status == 405 and content.endswith(b"\n"), f"{method} {template}: {status}; expected 405"
            allowed = {name.strip() for name in headers["allow"].split(",")} - {"HEAD"}
            assert allowed == {name for name in METHODS if name.lower() in item}, f"{template}: {allowed}"
            continue
        if template == "/v1/reports":
            continue
        success = SUCCESS.get(method, 200)
        body = json.dumps({"target": 7, "scale_down_delay": "30s", "ready_pods": 3}) if method == "PUT" else None
        check(success, OPEN, method, template, body=body)
        if template in PUBLIC:
            assert item["get"]["security"] == [], template
            assert ask(WITH_TOKENS, "GET", template)[0] != 401, template
        else:
            assert "security" not in item[method.lower()], template
            check(401, WITH_TOKENS, method, template, body=body)

for template in KEYED:
    for method in [method for method in METHODS if method.lower() in DOCUMENT["paths"][template]]:
        body = "{}" if method == "PUT" else None
        check(403, WITH_TOKENS, method, template, body=body, headers=token(ELSEWHERE))
        unknown = names(template) + ("&" if "?" in names(template) else "?") + "colour=red"
        check(400, OPEN, method, template, path=unknown, body=body)
        if method == "GET":
            check(404, OPEN, method, template, path=names(template).replace("rev", "another"))

for template, item in DOCUMENT["paths"].items():
    for parameter in map(resolve, item.get("parameters", []) + item.get("get", {}).get("parameters", [])):
        if parameter["in"] == "query" and parameter["name"] not in ["namespace", "name"]:
            values = parameter["schema"].get("enum", ["1"])
            query = f"{parameter['name']}={values[-1]}"
            check(200, OPEN, "GET", template, path=names(template) + ("&" if "?" in names(template) else "?") + query)

for template in SETTINGS:
    everything = json.loads(ask(OPEN, "GET", names(template))[2])
    put = schema_of(DOCUMENT["components"]["schemas"]["NewSettings"])
    jsonschema.Draft202012Validator(put).validate(everything)
    check(200, OPEN, "PUT", template, body=json.dumps(everything))
    check(400, OPEN, "PUT", template, body='{"target": 0}')
    check(413, OPEN, "PUT", template, body=json.dumps({"metric": "x" * 20_000}))
    check(409, READ_ONLY, "PUT", template, body='{"target": 7}')
    check(409, READ_ONLY, "DELETE", template)

check(400, OPEN, "GET", "/v1/keys", path="/v1/keys?limit=many")
for parameter in DOCUMENT["paths"]["/v1/keys"]["get"]["parameters"]:
    for value in resolve(parameter)["schema"].get("enum", []):
        check(200, OPEN, "GET", "/v1/keys", path=f"/v1/keys?{parameter['name']}={value}")
        check(400, OPEN, "GET", "/v1/keys", path=f"/v1/keys?{parameter['name']}={value}x")
lists = {name: json.loads(check(200, OPEN, "GET", "/v1/keys", path=f"/v1/keys?{query}"))["found"]
         for name, query in [("all", "search=ns%2Frev&limit=10"), ("none", "search=nobody")]}
assert lists == {"all": 1, "none": 0}, lists
for template in [path for path in KEYED if path.endswith("/senders")]:
    senders = json.loads(ask(OPEN, "GET", names(template))[2])["senders"]
    assert [sender["name"] for sender in senders] == ["pod"], senders

etag = ask(OPEN, "GET", "/module/inflight_filter.wasm")[1]["etag"]
check(304, OPEN, "GET", "/module/inflight_filter.wasm", headers={"if-none-match": etag})
for template in PUBLIC[2:]:
    check(404, WITH_TOKENS, "GET", template)

documented = {
    (template, method.upper(), status)
    for template, item in DOCUMENT["paths"].items()
    for method in item.keys() - {"parameters"}
    for status in item[method]["responses"]
}
left = sorted(row for row in documented - seen if row[2] not in NOT_ASKED_FOR)
assert not left, f"answers that were never seen: {left}"
print(f"{len(seen)} answers of {len(documented)}")
