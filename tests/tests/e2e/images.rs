//! The images, unpacked and used: the server out of one, and the module out of the other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{built, http, root, statserver_program, wait};
use serde_json::{Value, json};

const SETTLED: Duration = Duration::from_secs(15);
const VERSION: &str = "9.8.7";

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Builds the images of the programs that the tests have: `make images` builds static ones for both
/// architectures, which takes minutes. Returns `None` where the kernel refuses.
fn images(folder: &Path) -> Option<()> {
    let context = folder.join("context");
    for arch in ["amd64", "arm64"] {
        fs::create_dir_all(context.join(arch)).expect("a folder");
        fs::copy(statserver_program(), context.join(arch).join("inflight-statserver")).expect("a copy");
    }
    fs::copy(root().join("LICENSE"), context.join("LICENSE")).expect("a copy");
    let module = built("wasm32-wasip1/release/inflight_filter.wasm");
    fs::copy(module, context.join("inflight_filter.wasm")).expect("a copy");
    let output =
        Command::new(root().join("tools/images.sh")).arg(folder).arg(VERSION).output().expect("bash");
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(3) {
        assert_eq!(said.lines().count(), 1, "{said}");
        println!("NOT TESTED: {said}");
        return None;
    }
    assert!(output.status.success(), "{said}");
    Some(())
}

/// An image of an archive: its configuration, and its files.
struct Image {
    config: Value,
    layers: usize,
    files: PathBuf,
}

/// Unpacks the image of an architecture, or the only one.
fn unpack(folder: &Path, name: &str, arch: &str) -> Image {
    let layout = folder.join(format!("{name}-{arch}"));
    let files = layout.join("files");
    fs::create_dir_all(&files).expect("a folder");
    let archive = folder.join(format!("{name}-{VERSION}.oci.tar"));
    run(Command::new("tar").arg("--extract").arg("--file").arg(archive).arg("--directory").arg(&layout));
    let blob = |digest: &Value| {
        let digest = digest.as_str().and_then(|digest| digest.split_once(':')).expect("a digest");
        assert_eq!(
            run(Command::new("sha256sum").arg(layout.join("blobs/sha256").join(digest.1)))[..64],
            *digest.1
        );
        layout.join("blobs/sha256").join(digest.1)
    };
    let json =
        |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON") };
    let index = json(&layout.join("index.json"));
    assert_eq!(index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"], VERSION);
    let mut manifest = json(&blob(&index["manifests"][0]["digest"]));
    if let Some(manifests) = manifest["manifests"].as_array() {
        let fits = |manifest: &&Value| manifest["platform"]["architecture"] == arch;
        manifest = json(&blob(&manifests.iter().find(fits).expect("the architecture")["digest"]));
    }
    let layers = manifest["layers"].as_array().expect("layers");
    for layer in layers {
        run(Command::new("tar")
            .args(["--extract", "--gzip", "--file"])
            .arg(blob(&layer["digest"]))
            .arg("--directory")
            .arg(&files));
    }
    Image { config: json(&blob(&manifest["config"]["digest"])), layers: layers.len(), files }
}

fn assert_labels(image: &Image, title: &str) {
    let labels = &image.config["config"]["Labels"];
    let label = |name: &str| labels[format!("org.opencontainers.image.{name}")].as_str().unwrap_or_default();
    assert_eq!((label("title"), label("version"), label("licenses")), (title, VERSION, "Apache-2.0"));
    assert!(label("source").starts_with("https://") && !label("description").is_empty(), "{labels}");
    let revision = label("revision");
    assert!(revision == "unknown" || revision.len() == 40, "{labels}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_and_the_module_out_of_the_images_count_every_request() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(()) = images(folder.path()) else { return };
    let module = fs::read(built("wasm32-wasip1/release/inflight_filter.wasm")).expect("the module");

    let filter = unpack(folder.path(), "inflight-filter", "amd64");
    assert_labels(&filter, "inflight-filter");
    assert_eq!(filter.layers, 1, "whoever pulls a module reads one layer");
    let plugin = filter.files.join("plugin.wasm");
    assert!(fs::read(&plugin).expect("the module") == module, "other bytes");

    let other = unpack(folder.path(), "inflight-statserver", "arm64");
    assert_eq!(other.config["architecture"], "arm64");
    let server = unpack(folder.path(), "inflight-statserver", "amd64");
    assert_labels(&server, "inflight-statserver");
    let config = &server.config["config"];
    assert_eq!((&config["User"], &server.config["architecture"]), (&json!("65532:65532"), &json!("amd64")));
    assert_eq!(config["Entrypoint"], json!(["/inflight-statserver"]));
    let in_image = |path: &str| server.files.join(path.trim_start_matches('/'));
    // What the image sets, with the image's root.
    let mut command = Command::new(in_image("/inflight-statserver"));
    for variable in config["Env"].as_array().expect("variables") {
        let (name, value) = variable.as_str().and_then(|v| v.split_once('=')).expect("a variable");
        if name == "INFLIGHT_MODULE" {
            command.env(name, in_image(value));
        }
    }
    let server = StatServer::run(command, None, &[]).await;
    let digest = http::get(server.address, "/module/sha256").await.expect("a digest");
    assert_eq!(digest.trim(), &run(Command::new("sha256sum").arg(&plugin))[..64]);

    for version in [Version::Oldest, Version::Newest] {
        let app = App::start().await;
        let before = server.total().await;
        let mut bootstrap = Bootstrap::sidecar(app.address, server.address);
        bootstrap.module(&plugin);
        let envoy = Envoy::start(version, &bootstrap, 2).await;
        let plan = Plan { requests: 500, connections: 10, average_ms: 5.0, mixed: true, ..Plan::default() };
        let sent = Load::start(plan, envoy.address, &app.counts).finish().await;
        assert_eq!(envoy.requests_when(sent).await.len() as u64, sent);
        wait::until_equal("the server's count", SETTLED, before + sent, || server.total()).await;
    }
}
