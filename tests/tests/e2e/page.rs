//! The live page, in a headless Chromium.

use std::net::SocketAddr;

use inflight_e2e::browser::Browser;
use inflight_e2e::reports::{Sender, send};
use inflight_e2e::statserver::StatServer;
use inflight_stats::{KeyReport, Report, Snapshot};
use serde_json::json;

/// Reports `concurrency` requests at once, throughout one second.
async fn report(address: SocketAddr, name: &str, concurrency: u64) {
    report_in(address, "ns", name, concurrency, 1).await;
}

/// Reports the same for the `second`th second of a sender.
async fn report_in(address: SocketAddr, namespace: &str, name: &str, concurrency: u64, second: u64) {
    let at = |seconds: u64| Snapshot {
        as_of_ns: 1 + seconds * 1_000_000_000,
        requests: seconds * concurrency,
        request_ns: u128::from(seconds * concurrency * 1_000_000_000),
        in_flight: u32::try_from(concurrency).expect("a small number"),
        ..Snapshot::default()
    };
    let (since, until) = (at(second - 1), at(second));
    let message =
        KeyReport { namespace: namespace.into(), name: name.into(), from_gateway: false, since, until };
    let report = Report { version: 1, pod: name.into(), incarnation: concurrency, messages: vec![message] };
    send(address, &report).await;
}

/// Returns the text of a key's row, column by column.
fn row(name: &str) -> String {
    let rows = "[...document.querySelectorAll('#keys tr')]";
    format!(
        "{rows}.filter(r => r.querySelector('button').textContent == 'ns/{name}').map(r => [...r.cells].slice(1).map(c => c.textContent).join(' ')).join()"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_shows_what_the_server_knows_each_second() {
    let server = StatServer::with(None, &["--target", "10", "--target-utilization-percentage", "100"]).await;
    let mut browser = Browser::start(1100, 700).await;
    let url = format!("http://{}/", server.address);
    browser.open(&url).await;
    browser.until("document.getElementById('state').textContent.split(',')[0]", json!("0 keys")).await;

    let reports = Sender::pod("b", "ns", "b").report_every(1, server.address, 30);
    report(server.address, "<img src=x onerror=alert(1)>", 1).await;
    // Stable, panic, in flight, requests per second, pods, desired: the server's figures, computed
    // by hand.
    browser.until(&row("b"), json!("30 30 30 30 1 3")).await;
    browser.until("document.querySelectorAll('#keys tr').length", json!(2)).await;
    assert_eq!(browser.value("document.images.length").await, json!(0), "a name is text");

    // With the keyboard alone: past the search field to the second key.
    for _ in 0..3 {
        browser.press("Tab", 9, "").await;
    }
    assert_eq!(browser.value("document.activeElement.textContent").await, json!("ns/b"));
    browser.press("Enter", 13, "\r").await;
    browser.until("document.getElementById('chart-title').textContent", json!("ns/b")).await;
    browser
        .until("document.querySelector('svg path.stable').getAttribute('d').includes('L')", json!(true))
        .await;
    assert_eq!(browser.value("document.activeElement.textContent").await, json!("ns/b"), "the focus stays");
    let senders = "[...document.querySelectorAll('#senders tr')].map(r => [...r.cells].slice(0, 5).map(c => c.textContent).join(' ')).join()";
    browser.until(senders, json!("b pod 30 0 30")).await;
    let reported_by = "document.getElementById('reported-by').textContent";
    browser
        .until(reported_by, json!("reported by 1 pod and 0 gateways; 0 % of the pods' requests are proxied"))
        .await;
    let panics = "getComputedStyle(document.querySelector('.chosen .panics')).display != 'none'";
    browser.until(panics, json!(true)).await;

    // The page updates itself.
    report(server.address, "b", 10).await;
    browser.until(&format!("{}.split(' ')[2]", row("b")), json!("40")).await;

    let ground = "getComputedStyle(document.body).backgroundColor";
    browser.prefers("light").await;
    assert_eq!(browser.value(ground).await, json!("rgb(255, 255, 255)"));
    browser.prefers("dark").await;
    assert_eq!(browser.value(ground).await, json!("rgb(20, 23, 28)"));

    browser.value("document.getElementById('search').value = 'ns/b'").await;
    browser.until("document.querySelectorAll('#keys tr').length", json!(1)).await;
    let outside: Vec<&String> = browser.asked.iter().filter(|asked| !asked.starts_with(&url)).collect();
    let data = outside.iter().all(|asked| asked.starts_with("data:") || asked.starts_with("about:"));
    assert!(data, "{outside:?}");

    drop((reports, server));
    let lost = "document.getElementById('state').className";
    browser.until(lost, json!("lost")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_takes_any_name_and_any_address() {
    let server = StatServer::start(None).await;
    for (namespace, name) in [("..", ".."), ("a/b", "c"), ("a", "b/c"), ("%", "#?&")] {
        report_in(server.address, namespace, name, 1, 1).await;
    }
    let mut browser = Browser::start(1100, 700).await;
    browser.open(&format!("http://{}/#%", server.address)).await;
    let state = "document.getElementById('state').textContent.split(',')[0]";
    browser.until(state, json!("4 keys")).await;
    let title = "document.getElementById('chart-title').textContent";
    let drawn = "document.querySelector('svg path.stable')?.getAttribute('d').includes('M')";
    for number in 0..4 {
        let button = format!("document.querySelectorAll('#keys button')[{number}]");
        let label = browser.value(&format!("{button}.click(); {button}.textContent")).await;
        browser.until(title, label).await;
        browser.until(drawn, json!(true)).await;
        browser.until("document.querySelectorAll('tr.chosen').length", json!(1)).await;
    }
    browser.until(state, json!("4 keys")).await;
    // Each key has an address of its own, even where the labels are the same.
    browser.open("about:blank").await;
    browser.open(&format!("http://{}/#a/b%2Fc", server.address)).await;
    browser.until("document.querySelector('tr.chosen button')?.title", json!("namespace a, name b/c")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_whose_reports_stopped_is_greyed_and_says_why() {
    let server = StatServer::with(None, &["--stable-window", "6s"]).await;
    report(server.address, "b", 30).await;
    let mut browser = Browser::start(1100, 700).await;
    browser.open(&format!("http://{}/", server.address)).await;
    let row = "document.querySelector('#keys tr')";
    let colour = |of: &str| format!("{row} && getComputedStyle({of}).color");
    let own = browser.value("getComputedStyle(document.body).color").await;
    browser.until(&format!("{row}?.classList.contains('silent')"), json!(true)).await;
    assert_ne!(browser.value(&colour(&format!("{row}.cells[1]"))).await, own, "grey");
    let title = browser.value(&format!("{row}.title")).await;
    assert!(title.as_str().is_some_and(|title| title.contains("fell silent")), "{title}");
}
