//! Tests of the documents: their commands run, their example works, and everything that they name
//! exists.
//!
//! The `sh` blocks of a document are one shell session, as for a reader who copies them one after
//! the other. A `text` block right after an `sh` block is the output of that block; `...` stands
//! for anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{built, debian, root, statserver_program, wait};
use serde_json::Value;
use tempfile::TempDir;

const SETTLED: Duration = Duration::from_secs(15);
/// How long a session may take while other tests run.
const SESSION: Duration = Duration::from_secs(120);

/// The packages under test, as in the Makefile.
macro_rules! tested {
    () => {
        "--locked --profile e2e --package inflight-stats --package inflight-filter \
         --package inflight-statserver --package inflight-budget --package inflight-e2e"
    };
}

/// Where a command is run that cannot run in a session here.
enum Elsewhere {
    /// In a step of a file that runs it.
    Step(&'static str, &'static str),
    /// `make` runs the same, without the name of a single test.
    OneTestOf(&'static str),
    /// Nowhere, with the reason.
    Nowhere(&'static str),
}

use Elsewhere::{Nowhere, OneTestOf, Step};

/// The commands that are run elsewhere, without their comments.
const ELSEWHERE: &[(&str, Elsewhere)] = &[
    (
        "sudo apt-get install -y gcc libc6-dev make curl python3 python3-venv",
        Nowhere("it takes root, and what it installs is there when a test runs"),
    ),
    (
        "curl --proto '=https' -sSf https://sh.rustup.rs | sh -s -- -y",
        Nowhere("it changes the account's Rust; .ci/run begins where it ends"),
    ),
    (". \"$HOME/.cargo/env\"", Nowhere("it belongs to the command before")),
    ("make run DURATION=20", Step(".ci/run", "make run DURATION=20")),
    ("make run SCALE=1", Step(".ci/run", "make run SCALE=1")),
    ("make test", Step(".ci/run", "make test")),
    ("make lint", Step(".ci/run", "make lint")),
    ("make deny", Step(".ci/run", "make deny")),
    ("make unit", Step("Makefile", "\ntest: unit ")),
    ("make budget", Step("Makefile", "\ntest: unit budget ")),
    ("make reference", Nowhere("`make unit` runs the same tests, which compare where this one writes")),
    ("make e2e", Step("Makefile", "\ntest: unit budget reproducible e2e ")),
    ("make", Step("Makefile", "\nsoak: all ")),
    (
        "make images",
        Nowhere("the images have a test of their own, which says so where no image can be built"),
    ),
    ("make bench", Nowhere("it measures for many minutes, and fails on nothing that a test could mend")),
    ("make bench QUICK=1", Nowhere("it takes wrk and nghttp2-client, and minutes")),
    (concat!("cargo test ", tested!(), " --lib --bins window"), OneTestOf("unit")),
    (
        concat!("cargo test ", tested!(), " --test budget -- --nocapture a_request_stays_within_its_budget"),
        OneTestOf("budget"),
    ),
    (concat!("cargo test ", tested!(), " --test e2e -- --nocapture install::"), OneTestOf("e2e")),
    (
        "curl -s localhost:8080/module/sha256",
        Nowhere(
            "it asks a cluster, by the port of the command before; the server's own tests ask the server",
        ),
    ),
];

/// Documents with a session of their own. All other documents below `docs/` share one session.
const README: &str = "README.md";
const KUBERNETES: &str = "deploy/README.md";
const INSTALL: &str = "docs/install.md";
const HIGH_AVAILABILITY: &str = "docs/high-availability.md";

/// Stands for kubectl, because there is no cluster: the files named to it must exist, and what is
/// applied must be filled in. `port-forward` is a stats server with the module and the session's
/// tokens. The Valkey of `deploy/high-availability` is one with the password of its Secret, which
/// that server then shares.
const KUBECTL: &str = r#"#!/usr/bin/env bash
echo "$*" >>kubectl.log
for argument; do
  case $before$argument in
  *--from-file=*) test -s "${argument##*=}" ;;
  -k*) test -s "$argument/kustomization.yaml" ;;
  *.yaml) test -s "$argument" ;;
  *--from-literal=*) test -n "${argument##*=}" ;;
  esac || { echo "there is no ${argument##*=}" >&2; exit 1; }
  before=$argument
  files=$argument
  if test -d "$argument"; then
    files=$(sed -n "s,^  - \(.*[.]yaml\)$,$argument/\1,p" "$argument/kustomization.yaml")
  fi
  if [[ " $* " = *" apply "* ]] && grep -sHE 'the-token-of-the-envoys|: ""$|0{64}' $files >&2; then
    echo "this is not filled in" >&2
    exit 1
  fi
done
if [[ " $* " = *" apply "*/valkey.yaml* ]]; then
  valkey-server --port 6379 --bind 127.0.0.1 --save '' --requirepass "$(cat store-password)" >/dev/null &
fi
if [[ " $* " = *" port-forward "* && -x target/release/inflight-statserver ]]; then
  # The one before may not have ended yet.
  while (exec 3<>"/dev/tcp/127.0.0.1/$argument") 2>/dev/null; do sleep 0.1; done
  if test -s store-password; then
    export INFLIGHT_STORE=redis://127.0.0.1:6379/0 INFLIGHT_STORE_PASSWORD_FILE=store-password
  fi
  exec target/release/inflight-statserver --token-file tokens --drain-delay 0s \
    --module target/wasm32-wasip1/release/inflight_filter.wasm
fi
"#;

/// The possible first words of a block's fence.
const LANGUAGES: [&str; 4] = ["sh", "text", "yaml", "promql"];

/// A document and its path in the repository.
struct Document {
    path: String,
    text: String,
}

/// A fenced block.
struct Block {
    language: String,
    text: String,
    /// Whether there is nothing between it and the previous block.
    follows: bool,
}

/// An `sh` block, and its output according to the document.
struct Commands {
    text: String,
    prints: Option<String>,
}

/// Returns the source files, by their paths in the repository, without built or downloaded files.
fn files() -> Vec<String> {
    const NOT_OURS: [&str; 6] = [".git", "target", ".cache", "corpus", "artifacts", "__pycache__"];
    let (mut files, mut folders) = (Vec::new(), vec![root().to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() && !path.is_symlink() {
                if !NOT_OURS.iter().any(|name| path.ends_with(name)) {
                    folders.push(path);
                }
            } else {
                let path = path.strip_prefix(root()).expect("a path in the repository");
                files.push(path.to_str().expect("UTF-8").to_owned());
            }
        }
    }
    files.sort();
    files
}

fn source(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn documents() -> Vec<Document> {
    let paths = files().into_iter().filter(|path| path.ends_with(".md"));
    paths.map(|path| Document { text: source(&path), path }).collect()
}

fn document(path: &str) -> Document {
    Document { path: path.to_owned(), text: source(path) }
}

impl Document {
    /// Returns the fenced blocks, and the text around them.
    fn parts(&self) -> (Vec<Block>, String) {
        let (mut blocks, mut prose) = (Vec::<Block>::new(), String::new());
        let (mut open, mut follows) = (false, false);
        for line in self.text.lines() {
            if let Some(language) = line.strip_prefix("```") {
                open = !open;
                if open {
                    blocks.push(Block { language: language.to_owned(), text: String::new(), follows });
                }
                follows = true;
            } else if open && let Some(block) = blocks.last_mut() {
                block.text.push_str(line);
                block.text.push('\n');
            } else {
                follows &= line.is_empty();
                prose.push_str(line);
                prose.push('\n');
            }
        }
        assert!(!open, "{}: a block without an end", self.path);
        (blocks, prose)
    }

    fn commands(&self) -> Vec<Commands> {
        let mut blocks = self.parts().0.into_iter().peekable();
        let mut all = Vec::new();
        while let Some(block) = blocks.next() {
            if block.language == "sh" {
                let prints =
                    blocks.next_if(|next| next.follows && next.language == "text").map(|next| next.text);
                all.push(Commands { text: block.text, prints });
            }
        }
        all
    }

    /// Returns the text between single backticks, outside of blocks.
    fn code(&self) -> Vec<String> {
        let prose = self.parts().1;
        // A span may continue on the next line.
        let prose = prose.replace('\n', " ");
        prose.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    /// Returns the targets of links, outside of blocks and code.
    fn links(&self) -> Vec<String> {
        let prose: String = self.parts().1.replace('\n', " ").split('`').step_by(2).collect();
        let targets = prose.split("](").skip(1);
        targets.filter_map(|rest| rest.split_once(')')).map(|(target, _)| target.to_owned()).collect()
    }

    /// Returns the anchors that GitHub gives to the headings.
    fn anchors(&self) -> BTreeSet<String> {
        let prose = self.parts().1;
        let headings = prose
            .lines()
            .filter(|line| line.starts_with('#'))
            .map(|line| line.trim_start_matches('#').trim());
        let mut seen = BTreeMap::<String, u32>::new();
        let mut anchor = |heading: &str| {
            let kept = heading.to_lowercase();
            let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            let name: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
            let count = seen.entry(name.clone()).or_default();
            *count += 1;
            if *count == 1 { name } else { format!("{name}-{}", *count - 1) }
        };
        headings.map(&mut anchor).collect()
    }
}

/// Returns a line without its comment.
fn command(line: &str) -> &str {
    line.split(" # ").next().unwrap_or_default().trim()
}

fn elsewhere(line: &str) -> Option<&'static Elsewhere> {
    ELSEWHERE.iter().find(|(listed, _)| *listed == command(line)).map(|(_, where_)| where_)
}

/// All processes that a session started. They end when this value is dropped.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let group = i32::try_from(self.0.id()).expect("a process id");
        // SAFETY: the child has not been waited for, so the id is its own, and its group's.
        unsafe { libc::kill(-group, libc::SIGKILL) };
        let _ = self.0.wait();
    }
}

/// A shell in a folder that looks like the repository after `make`, but with other ports.
struct Session {
    folder: TempDir,
    /// The documents' ports, each with the port that is used here.
    ports: Vec<(u16, u16)>,
}

/// The ports in the documents and in `envoy/envoy.yaml`.
const PORTS: [u16; 10] = [8080, 8081, 8082, 8083, 8443, 3000, 6379, 9090, 9901, 10000];

impl Session {
    fn new() -> Self {
        let listeners = PORTS.map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port"));
        let free = listeners.iter().map(|listener| listener.local_addr().expect("an address").port());
        let session = Self {
            ports: PORTS.into_iter().zip(free).collect(),
            folder: tempfile::tempdir().expect("a folder"),
        };
        debian("openssl", &["openssl"]);
        let release = |path: &Path| path.join("target/release");
        let module = "wasm32-wasip1/release/inflight_filter.wasm";
        let here = session.folder.path();
        for folder in [release(here), here.join("target/wasm32-wasip1/release"), here.join("programs")] {
            fs::create_dir_all(folder).expect("a folder");
        }
        // Without `--fail`, curl would take an error answer for a success.
        session.program(
            "curl",
            &format!("#!/bin/sh\nexec {} --fail \"$@\"\n", debian("curl", &["curl"]).display()),
        );
        symlink(statserver_program(), release(here).join("inflight-statserver")).expect("a link");
        symlink(built(module), here.join("target").join(module)).expect("a link");
        symlink(root().join("tools"), here.join("tools")).expect("a link");
        for file in
            files().iter().filter(|file| ["envoy/", "deploy/"].iter().any(|folder| file.starts_with(folder)))
        {
            let path = here.join(file);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            let text = session.with_ports(&source(file)).replace("address: 0.0.0.0", "address: 127.0.0.1");
            fs::write(path, text).expect("a file");
        }
        session
    }

    fn port(&self, documented: u16) -> u16 {
        let of = self.ports.iter().find(|(port, _)| *port == documented);
        of.map(|(_, free)| *free).expect("a documented port")
    }

    /// Replaces the documents' ports by the session's.
    fn with_ports(&self, text: &str) -> String {
        let is_digit = |c: char| c.is_ascii_digit();
        let mut words = Vec::new();
        let mut rest = text;
        while let Some(begin) = rest.find(is_digit) {
            let (before, number) = rest.split_at(begin);
            let (number, after) = number.split_at(number.find(|c| !is_digit(c)).unwrap_or(number.len()));
            let free = self.ports.iter().find(|(port, _)| port.to_string() == number);
            words.extend([before.to_owned(), free.map_or(number.to_owned(), |(_, free)| free.to_string())]);
            rest = after;
        }
        words.push(rest.to_owned());
        words.concat()
    }

    /// Puts a program into the folder where the session looks first.
    fn program(&self, name: &str, script: &str) {
        let path = self.folder.path().join("programs").join(name);
        fs::write(&path, script).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a program");
    }

    /// Puts the stand-in for kubectl there.
    fn kubectl(&self) {
        self.program("kubectl", &self.with_ports(KUBECTL));
    }

    /// Runs the blocks in a folder of the session. Returns the output of each.
    ///
    /// # Panics
    /// If a command fails.
    fn run(&self, folder: &str, blocks: &[Commands]) -> Vec<String> {
        let here = self.folder.path();
        // If this process is killed, everything that was started here ends.
        let mut script = format!(
            "set -euo pipefail\n(while kill -0 {}; do sleep 1; done; kill -KILL 0) 2>/dev/null >/dev/null &\n",
            std::process::id()
        );
        for block in blocks {
            script.push_str("printf '\\n=== a block\\n'\n");
            for line in block.text.lines().filter(|line| elsewhere(line).is_none()) {
                // Several Envoys run on this machine, and other tests run at the same time.
                let line = line.replace(
                    "-c target/envoy.yaml",
                    "-c target/envoy.yaml --disable-hot-restart --concurrency 2",
                );
                script.push_str(&self.with_ports(&line.replace("sleep 3", "sleep 6")));
                script.push('\n');
            }
            if block.text.contains("-c target/envoy.yaml &") {
                let started = "for url in localhost:9901/ready localhost:8080/healthz localhost:3000/; do\n\
                               until curl -s -o /dev/null $url; do sleep 0.1; done; done\n";
                script.push_str(&self.with_ports(started));
            }
        }
        let [file, output, log] = ["session.sh", "output", "log"].map(|name| here.join(name));
        fs::write(&file, &script).expect("a file");
        let [to, errors] = [&output, &log].map(|path| fs::File::create(path).expect("a file"));
        let path = std::env::var("PATH").unwrap_or_default();
        let mut shell = Command::new("bash");
        shell.arg(&file).current_dir(here.join(folder)).stdin(Stdio::null()).stdout(to).stderr(errors);
        shell.env("PATH", format!("{}:{path}", here.join("programs").display()));
        shell.env("INFLIGHT_LISTEN", format!("127.0.0.1:{}", self.port(8080)));
        shell.env("INFLIGHT_GRPC_LISTEN", format!("127.0.0.1:{}", self.port(8081)));
        let mut group = Group(shell.process_group(0).spawn().expect("bash"));
        let deadline = Instant::now() + SESSION;
        let ended = loop {
            match group.0.try_wait().expect("a child") {
                Some(status) => break status.success(),
                None if Instant::now() > deadline => break false,
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        let text = |path: &PathBuf| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        let log = text(&log);
        let last =
            log.lines().rev().take(20).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
        assert!(
            ended,
            "a command failed in\n{script}\nwhich printed\n{}\nand at last logged\n{last}",
            text(&output)
        );
        drop(group);
        text(&output).split("\n=== a block\n").skip(1).map(str::to_owned).collect()
    }
}

/// Compares the output with the document's, line by line.
fn assert_printed(path: &str, block: &Commands, printed: &str) {
    let lines = |text: &str| {
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect::<Vec<_>>()
    };
    let Some(expected) = block.prints.as_deref().map(lines) else { return };
    let printed = lines(printed);
    let fits = |line: &str, pattern: &str| {
        let mut rest = Some(line);
        let parts: Vec<&str> = pattern.split("...").collect();
        for (i, part) in parts.iter().enumerate() {
            rest = rest.and_then(|rest| match i {
                0 => rest.strip_prefix(part),
                _ => rest.find(part).map(|at| &rest[at + part.len()..]),
            });
        }
        rest.is_some_and(|rest| rest.is_empty() || pattern.ends_with("..."))
    };
    let agree = printed.len() == expected.len()
        && printed.iter().zip(&expected).all(|(line, pattern)| fits(line, pattern));
    assert!(agree, "{path}:\n{}\nprinted {printed:#?}, not {expected:#?}", block.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_in_the_readme_counts_in_a_real_envoy() {
    let (blocks, _) = document(README).parts();
    let example = blocks.iter().find(|block| block.language == "yaml").expect("an example");
    let filters: Vec<Value> = serde_norway::from_str(&example.text).expect("YAML");
    let [filter] = &filters[..] else { panic!("one filter, not {}", filters.len()) };
    for version in [Version::Oldest, Version::Newest] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let mut bootstrap = Bootstrap::sidecar(app.address, server.address);
        *bootstrap.filter() = filter.clone();
        bootstrap.module(&built("wasm32-wasip1/release/inflight_filter.wasm"));
        let envoy = Envoy::start(version, &bootstrap, 2).await;
        let plan = Plan { requests: 100, connections: 5, average_ms: 2.0, seed: 1, ..Plan::default() };
        let sent = Load::start(plan, envoy.address, &app.counts).finish().await;
        wait::until_equal("the server's count", SETTLED, sent, || server.total()).await;
    }
}

#[test]
fn the_commands_of_the_readme_print_what_it_says() {
    let readme = document(README);
    let blocks = readme.commands();
    let printed = Session::new().run("", &blocks);
    assert!(blocks.iter().any(|block| block.prints.is_some()), "the README says what its commands print");
    blocks.iter().zip(&printed).for_each(|(block, printed)| assert_printed(&readme.path, block, printed));
}

#[test]
fn the_commands_of_the_reference_run_beside_those_of_the_readme() {
    let mut all: Vec<(String, Commands)> = Vec::new();
    let shares = |path: &str| path.starts_with("docs/") && ![INSTALL, HIGH_AVAILABILITY].contains(&path);
    let reference = documents().into_iter().filter(|document| shares(&document.path));
    for document in [document(README)].into_iter().chain(reference) {
        all.extend(document.commands().into_iter().map(|block| (document.path.clone(), block)));
    }
    let (paths, blocks): (Vec<String>, Vec<Commands>) = all.into_iter().unzip();
    let printed = Session::new().run("", &blocks);
    for ((path, block), printed) in paths.iter().zip(&blocks).zip(&printed) {
        assert_printed(path, block, printed);
    }
}

#[test]
fn the_steps_of_the_install_page_run_as_far_as_they_can_without_a_cluster() {
    let session = Session::new();
    session.kubectl();
    let page = document(INSTALL);
    let blocks = page.commands();
    let printed = session.run("", &blocks);
    blocks.iter().zip(&printed).for_each(|(block, printed)| assert_printed(&page.path, block, printed));
}

#[test]
fn the_servers_of_the_high_availability_page_share_a_real_store() {
    let session = Session::new();
    session.kubectl();
    // Debian 12 has no Valkey. What is used of it here is the same.
    let store = debian("redis-server", &["redis-server"]);
    session.program("valkey-server", &format!("#!/bin/sh\nexec {} \"$@\"\n", store.display()));
    // The page begins after the steps of the install page that make it.
    fs::write(session.folder.path().join("tokens"), "0123456789abcdef *\n").expect("a file");
    let page = document(HIGH_AVAILABILITY);
    let blocks = page.commands();
    let printed = session.run("", &blocks);
    blocks.iter().zip(&printed).for_each(|(block, printed)| assert_printed(&page.path, block, printed));
}

#[test]
fn what_the_kubernetes_page_makes_lets_keda_and_a_token_in() {
    let session = Session::new();
    session.kubectl();
    let mut blocks = document(KUBERNETES).commands();
    let name = "inflight-statserver.inflight";
    blocks.push(Commands {
        text: format!(
            "../target/release/inflight-statserver --token-file tokens --grpc-tls-cert statserver.crt \
             --grpc-tls-key statserver.key --grpc-tls-client-ca ca.crt &\n\
             curl -s --retry 5 --retry-connrefused -H \"authorization: Bearer $(sed -n '1s/ .*//p' tokens)\" \
             localhost:8080/v1/keys; echo\n\
             printf '\\0\\0\\0\\0\\0' >nothing\n\
             ask() {{ curl -s --http2 --cacert ca.crt --resolve {name}:8081:127.0.0.1 --data-binary @$1 \
             -H 'content-type: application/grpc' -H 'te: trailers' -D - -o answer \"${{@:2}}\" \
             https://{name}:8081/externalscaler.ExternalScaler/IsActive | grep -a '^grpc-status'; }}\n\
             ask nothing --cert keda.crt --key keda.key; ask /dev/null\n\
             cat kubectl.log\n"
        ),
        prints: None,
    });
    let printed = session.run("deploy", &blocks).pop().expect("what was asked");
    let is_answer = |line: &&str| line.starts_with('{') || line.starts_with("grpc-status");
    let (answers, asked): (Vec<&str>, Vec<&str>) = printed.lines().partition(is_answer);
    // KEDA's question names no key, which is INVALID_ARGUMENT. Without its certificate it is
    // UNAUTHENTICATED.
    let answers: Vec<&str> = answers.into_iter().map(str::trim).collect();
    assert_eq!(answers, [r#"{"keys":[],"found":0}"#, "grpc-status: 3", "grpc-status: 16"], "{printed}");
    let manifests = files().into_iter().filter(|file| file.starts_with("deploy/") && file.ends_with(".yaml"));
    let manifests: Vec<String> = manifests.map(|file| source(&file)).collect();
    let secrets = asked.iter().filter_map(|line| line.split_once("create secret generic "));
    let secrets: Vec<&str> = secrets.filter_map(|(_, rest)| rest.split(' ').next()).collect();
    assert_eq!(secrets.len(), 4, "{printed}");
    for secret in secrets {
        assert!(
            manifests.iter().any(|text| text.contains(&format!("ame: {secret}\n"))),
            "{secret} is in no manifest"
        );
    }
}

#[test]
fn every_command_of_the_documents_is_run_or_listed() {
    let is_run = |path: &str| path == README || path == KUBERNETES || path.starts_with("docs/");
    let mut listed = BTreeSet::new();
    for document in documents() {
        for block in document.parts().0 {
            let (path, language) = (&document.path, &block.language);
            assert!(
                LANGUAGES.contains(&language.as_str()),
                "{path}: a block of {language:?}, expected {LANGUAGES:?}"
            );
        }
        let blocks = document.commands();
        for line in blocks.iter().flat_map(|block| block.text.lines()) {
            let command = command(line);
            if elsewhere(line).is_some() {
                listed.insert(command.to_owned());
            } else if !is_run(&document.path) && !command.is_empty() && !command.starts_with('#') {
                panic!("{}: nobody runs `{command}`", document.path);
            }
        }
    }
    for (command, where_) in ELSEWHERE {
        assert!(listed.contains(*command), "`{command}` is listed and in no document");
        match where_ {
            Step(file, step) => {
                assert!(source(file).contains(step), "{file} no longer has {step:?} for `{command}`")
            }
            OneTestOf(target) => {
                let output = Command::new("make")
                    .current_dir(root())
                    .args(["--dry-run", "CARGO=cargo", target])
                    .output();
                let output = output.expect("make");
                let text = String::from_utf8_lossy(&output.stdout).replace("\\\n", "");
                let steps = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
                let (all, _) = command.rsplit_once(' ').expect("the name of a test");
                assert!(
                    steps.into_iter().any(|step| step.starts_with(all)),
                    "`make {target}` runs no `{all}`:\n{text}"
                );
            }
            Nowhere(reason) => assert!(!reason.is_empty()),
        }
    }
}

#[test]
fn every_link_in_the_documents_leads_somewhere() {
    let mut broken = Vec::new();
    for document in documents() {
        for link in document.links().iter().filter(|link| !link.contains("://")) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let folder = root().join(&document.path);
            let folder = folder.parent().expect("a folder");
            let target = if path.is_empty() { root().join(&document.path) } else { folder.join(path) };
            let text =
                || Document { path: link.clone(), text: fs::read_to_string(&target).unwrap_or_default() };
            if !target.exists() || !(anchor.is_empty() || text().anchors().contains(anchor)) {
                broken.push(format!("{}: {link}", document.path));
            }
        }
    }
    assert!(broken.is_empty(), "broken links: {broken:#?}");
}

#[test]
fn every_path_target_and_test_that_the_documents_name_is_there() {
    let files = files();
    let makefile = source("Makefile");
    let tests: String = files.iter().filter(|file| file.ends_with(".rs")).map(|file| source(file)).collect();
    let is_word = |text: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c))
    };
    let is_name = |text: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    let is_there = |document: &Document, code: &str| {
        let top = ["src", "tests", "benches", "fuzz", "envoy", "deploy", "docs", "tools", ".ci"];
        if let Some(words) = code.strip_prefix("make ") {
            let target = words.split(' ').next().unwrap_or_default();
            return makefile.contains(&format!("\n{target}:"));
        }
        if let Some(begin) = code.strip_suffix('…')
            && is_name(begin)
        {
            return tests.contains(&format!("fn {begin}"));
        }
        // In that document, a name of this many words is a test's.
        if document.path == "RELIABILITY.md" && is_name(code) && code.matches('_').count() >= 5 {
            return tests.contains(&format!("fn {code}("));
        }
        if is_word(code) && code.split_once('/').is_some_and(|(first, _)| top.contains(&first)) {
            return root().join(code).exists();
        }
        let endings = [".rs", ".yaml", ".sh", ".py", ".md", ".toml", ".c"];
        if is_word(code) && !code.contains('/') && endings.iter().any(|ending| code.ends_with(ending)) {
            return files.iter().any(|file| file.rsplit('/').next() == Some(code));
        }
        true
    };
    let mut missing = Vec::new();
    for document in documents() {
        let lines = document
            .commands()
            .into_iter()
            .flat_map(|block| block.text.lines().map(|line| command(line).to_owned()).collect::<Vec<_>>());
        let make = lines.filter(|line| line.starts_with("make "));
        for code in document.code().into_iter().chain(make) {
            if !is_there(&document, &code) {
                missing.push(format!("{}: {code}", document.path));
            }
        }
    }
    assert!(missing.is_empty(), "not there: {missing:#?}");
}
