//! The program's commands for people.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use inflight_e2e::process::Process;
use inflight_e2e::reports::Sender;
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tls::{Authority, Identity};
use inflight_e2e::{statserver_program, wait};

const SETTLED: Duration = Duration::from_secs(15);

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(statserver_program());
    command.args(args).env_remove("INFLIGHT_TOKEN");
    command
}

/// Returns the exit code, and what was printed to each of the two.
fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the program");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (status.code().expect("no signal"), text(&stdout), text(&stderr))
}

/// Reports so many requests per second, and as many in flight, over five seconds: so long the figures
/// stay as they are.
async fn report(server: &StatServer, (namespace, name): (&str, &str), pod: &str, requests: u32) {
    Sender::pod(pod, namespace, name).report(server.address, requests, 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_of_a_server_are_a_table() {
    let server = StatServer::start(None).await;
    let url = format!("http://{}", server.address);
    let (code, printed, _) = run(&mut command(&["keys", "--server", &url]));
    assert_eq!((code, printed.as_str()), (0, "no key has been reported\n"));
    report(&server, ("shop", "cart"), "cart-1", 7).await;
    report(&server, ("shop", "cart"), "cart-2", 4).await;
    report(&server, ("a-long-namespace", ".."), "x", 3).await;

    let (code, printed, errors) = run(&mut command(&["keys", "--server", &url]));
    assert_eq!((code, errors.as_str()), (0, ""));
    let lines: Vec<&str> = printed.lines().collect();
    let [head, first, second] = lines[..] else { panic!("{printed}") };
    assert!(
        first.starts_with("a-long-namespace  ..  ") && second.starts_with("shop              cart  "),
        "{printed}"
    );
    assert!(first.ends_with("  unknown yet") && second.ends_with("  unknown yet"), "{printed}");
    for (column, numbers) in
        [("IN FLIGHT", ["3", "11"]), ("PODS", ["1", "2"]), ("REQUESTS/S", ["3.00", "11.00"])]
    {
        let end = head.find(column).expect("the column") + column.len();
        for (line, number) in [first, second].into_iter().zip(numbers) {
            assert_eq!(line[..end].split(' ').next_back(), Some(number), "{column}:\n{printed}");
        }
    }

    let (code, printed, _) = run(&mut command(&["keys", "shop/cart", "--server", &url]));
    assert_eq!(code, 0);
    for expected in [
        "key                         shop/cart\n",
        "\nin flight                   11\n",
        "\nstate                       it was first reported less than a stable window ago",
        "\ncart-1  pod   yes",
    ] {
        assert!(printed.contains(expected), "{expected}:\n{printed}");
    }
    let (code, printed, errors) = run(&mut command(&["keys", "shop/none", "--server", &url]));
    assert_eq!((code, printed.as_str()), (1, ""));
    assert!(
        errors.contains("404 Not Found: key shop/none is unknown") && errors.lines().count() == 1,
        "{errors}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_watches_sees_changes_and_restarts() {
    let mut server = StatServer::start(None).await;
    report(&server, ("shop", "cart"), "cart-1", 7).await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut watching = command(&["keys", "--watch", "--server", &format!("http://{}", server.address)]);
    let watching = Process::start(&mut watching, &folder.path().join("log"));
    let shows = async |what: &str| {
        wait::until(what, SETTLED, async || {
            let log = watching.log();
            if log.contains(what) { Ok(()) } else { Err(log) }
        })
        .await;
    };
    shows("cart").await;
    report(&server, ("shop", "basket"), "basket-1", 7).await;
    shows("basket").await;
    server.process.kill();
    shows("cannot connect to 127.0.0.1").await;
    let again = StatServer::start(Some(server.address)).await;
    report(&again, ("shop", "shelf"), "shelf-1", 7).await;
    shows("shelf").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_are_shown_set_and_deleted_with_a_token_over_tls() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path.to_str().expect("a path").to_owned()
    };
    let authority = Authority::new();
    let Identity { certificate, key } = authority.issue(folder.path(), "server");
    let path = |path: &Path| path.to_str().expect("a path").to_owned();
    let tokens = file("tokens", "reader-of-shop-0123 shop\nadmin-of-all-012345 * admin\n");
    let flags = ["--token-file", &tokens, "--tls-cert", &path(&certificate), "--tls-key", &path(&key)];
    // The token of a command is no flag of the server.
    let server = StatServer::launch(None, &flags, &[("INFLIGHT_TOKEN", "admin-of-all-012345".into())]).await;
    assert!(!server.process.log().contains("unknown environment variable"), "{}", server.process.log());
    let (url, cacert) = (format!("https://{}", server.address), file("ca", &authority.pem));
    let to = ["--server", &url, "--cacert", &cacert];
    let ask = |args: &[&str], token: &str| {
        let mut command = command(&[args, &to[..]].concat());
        run(command.env("INFLIGHT_TOKEN", token))
    };
    let admin = "admin-of-all-012345";
    let (code, printed, errors) = ask(&["settings", "set", "shop/cart", r#"{"target": 12}"#], admin);
    assert!(code == 0 && printed.contains("\"target\": 12.0"), "{printed}{errors}");
    let (code, printed, _) = ask(&["settings", "get", "shop/cart"], "reader-of-shop-0123");
    assert!(code == 0 && printed.contains("\"target\": 12.0"), "{printed}");
    // The first token of a file; a file goes before the variable.
    let (code, printed, _) = ask(&["keys", "--token-file", &tokens], "unknown-token-0123");
    assert!(code == 0 && printed.contains("shop"), "{printed}");
    let (code, printed, _) = ask(&["settings", "delete", "shop/cart"], admin);
    assert_eq!((code, printed.as_str()), (0, "shop/cart is scaled by the server's defaults\n"));

    for (args, token, expected) in [
        (
            &["settings", "set", "shop/cart", "{}"][..],
            "reader-of-shop-0123",
            "403 Forbidden: changing settings requires",
        ),
        (
            &["settings", "get", "shop/cart"],
            "",
            "401 Unauthorized: no bearer token; expected a token, by --token-file",
        ),
        (
            &["settings", "set", "shop/cart", r#"{"target": 0}"#],
            admin,
            "`target` is 0; expected a number from 0.01 to 1000000000",
        ),
        (&["settings", "set", "shop/cart", r#"{"targt": 1}"#], admin, "did you mean `target`?"),
    ] {
        let (code, printed, errors) = ask(args, token);
        assert_eq!((code, printed.as_str()), (1, ""), "{args:?}");
        assert!(errors.contains(expected) && errors.lines().count() == 1, "{args:?}: {errors}");
        assert!(!errors.contains("0123"), "no secret: {errors}");
    }
    let (code, _, errors) = run(&mut command(&["keys", "--server", &url]));
    assert!(code == 1 && !errors.is_empty(), "a CA that the system does not trust: {errors}");
    let (code, _, errors) = run(&mut command(&["keys", "--server", &url, "--cacert", &tokens]));
    assert!(code == 1 && errors.contains("expected CA certificates in PEM"), "{errors}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_is_checked_as_the_filter_checks_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("plugin.json");
    let check = |text: &str, istio: bool| {
        std::fs::write(&path, text).expect("a file");
        let mut command = command(&["check-config"]);
        if istio {
            command.arg("--istio");
        }
        run(command.arg(&path))
    };
    let (code, printed, _) = check(r#"{"namespace": "shop", "revision": "cart", "pod": "p"}"#, false);
    assert!(code == 0 && printed.contains("\"reporting_period\": \"1s\""), "{printed}");
    let (code, _, errors) = check(r#"{"statserver": {"cluster": "c"}}"#, false);
    assert!(code == 1 && errors.contains("`namespace`"), "{errors}");
    let (code, printed, _) = check(r#"{"statserver": {"cluster": "c"}}"#, true);
    assert!(code == 0 && printed.contains("\"path\": \"/v1/reports\""), "{printed}");
    let (code, printed, errors) = check(r#"{"reporting_perod": "1s"}"#, true);
    let expected = "unknown key `reporting_perod`; did you mean `reporting_period`?\n";
    assert!(code == 1 && printed.is_empty() && errors.ends_with(expected), "{errors}");
    assert_eq!(errors.lines().count(), 1);
}
