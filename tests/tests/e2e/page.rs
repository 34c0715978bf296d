//! The live page, in a headless Chromium.

use std::net::SocketAddr;

use http_body_util::Full;
use hyper::Request;
use inflight_e2e::browser::Browser;
use inflight_e2e::http;
use inflight_e2e::reports::{Sender, send};
use inflight_e2e::statserver::StatServer;
use inflight_stats::{KeyReport, Report, Snapshot};
use serde_json::{Value, json};

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

/// Returns the text of a key's row, column by column, without the age of its last report.
fn row(name: &str) -> String {
    let rows = "[...document.querySelectorAll('#keys tr')]";
    format!(
        "{rows}.filter(r => r.querySelector('button').textContent == 'ns/{name}').map(r => [...r.cells].slice(1, -1).map(c => c.textContent).join('|')).join()"
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
    // Source, stable, panic, in flight, requests per second, target, load, ready pods, desired: the
    // server's figures, computed by hand.
    browser.until(&row("b"), json!("1 sidecar|30|30|30|30|10|300 %|1|3")).await;
    browser.until("document.querySelectorAll('#keys tr').length", json!(2)).await;
    assert_eq!(browser.value("document.images.length").await, json!(0), "a name is text");

    // With the keyboard alone, from the filter past the columns to the second key.
    browser.value("document.getElementById('shown').focus()").await;
    for _ in 0..12 {
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
    browser.until(&format!("{}.split('|')[3]", row("b")), json!("40")).await;

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
    let drawn = "document.querySelector('svg path.pods')?.getAttribute('d').includes('M')";
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_says_why_a_key_wants_so_many_pods() {
    let flags = ["--target", "10", "--target-utilization-percentage", "50"];
    let server = StatServer::with(None, &flags).await;
    let settings = r#"{"target": 10, "target_utilization_percentage": 50, "max_scale": 2}"#;
    let put = Request::put("/v1/keys/ns/capped/settings").header("host", "test");
    let put = put.body(Full::from(settings)).expect("a request");
    assert_eq!(http::ask(server.address, put).await.expect("an answer").0, 200);
    let _reports = Sender::pod("b", "ns", "b").report_every(1, server.address, 30);
    let _capped = Sender::pod("capped", "ns", "capped").report_every(1, server.address, 30);
    let mut browser = Browser::start(1100, 900).await;
    browser.open(&format!("http://{}/#ns/b", server.address)).await;
    let why = |term: &str| {
        let terms = "[...document.querySelectorAll('#why dt')]";
        format!("{terms}.find(t => t.textContent == '{term}')?.nextSibling.textContent")
    };
    browser.until(&why("Target per pod"), json!("10 × 50 % = 5 requests at once")).await;
    browser.until(&why("Stable"), json!("30 ÷ 5 = 6 pods, over 60 s")).await;
    browser.until(&why("Ready pods"), json!("1; load 600 % of their target")).await;
    let desired = format!("{}?.split(':')[0]", why("Desired pods"));
    browser.until(&desired, json!("6; panic mode")).await;
    browser.until(&format!("{}?.includes('÷ 5')", why("Panic")), json!(true)).await;

    // The target of the one ready pod is 5 of what the axis shows, and so is the line.
    let lines = "['target', 'ready', 'pods'].map(s => document.querySelector(`svg path.${s}`)?.getAttribute('d').length > 9).join()";
    browser.until(lines, json!("true,true,true")).await;
    let units = "[...document.querySelectorAll('svg .unit')].map(t => t.textContent).join()";
    browser.until(units, json!("requests at once,pods")).await;
    let times = "[...document.querySelectorAll('svg text')].filter(t => /^\\d\\d:\\d\\d:\\d\\d$/.test(t.textContent)).length";
    browser.until(times, json!(6)).await;

    // Values under the pointer, and with the keyboard.
    let mut moved = json!({"type": "mouseMoved", "x": 1030});
    let chart = "document.getElementById('chart').getBoundingClientRect()";
    let y = browser.value(&format!("{chart}.top + 100")).await;
    moved["y"] = y;
    browser.call("Input.dispatchMouseEvent", moved).await;
    let values = "document.getElementById('values').textContent.replace(/^[\\d:]+/, 'T')";
    let wanted = "T stable 30, panic 30 requests at once, 30 in flight; target 5 per pod, 5 of all; 1 ready, 6 desired";
    browser.until(values, json!(wanted)).await;
    browser.value("document.getElementById('chart').focus()").await;
    browser.press("Escape", 27, "").await;
    browser.until(values, json!("Point at the chart for single values.")).await;
    browser.press("ArrowLeft", 37, "").await;
    browser.until(values, json!(wanted)).await;

    // A bound of the settings.
    browser.value("location.hash = '#ns/capped'").await;
    browser.until("document.getElementById('chart-title').textContent", json!("ns/capped")).await;
    let capped = format!("{}?.includes('max_scale is 2')", why("Desired pods"));
    browser.until(&capped, json!(true)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_sorts_and_filters_all_keys() {
    let server = StatServer::with(None, &["--target", "100"]).await;
    for number in 0..120 {
        report(server.address, &format!("quiet-{number:03}"), 1).await;
    }
    // By name it is beyond what is shown.
    let _reports = Sender::pod("z", "ns", "z").report_every(1, server.address, 50);
    let mut browser = Browser::start(1100, 900).await;
    browser.open(&format!("http://{}/", server.address)).await;
    let first = "document.querySelector('#keys button')?.textContent";
    let number = "document.querySelectorAll('#keys tr').length";
    browser.until(first, json!("ns/quiet-000")).await;
    browser.until(number, json!(100)).await;
    browser.until("document.getElementById('more').textContent", json!("and 21 more: use Find")).await;
    let press = |column: &str| {
        let buttons = "[...document.querySelectorAll('#columns button')]";
        format!("{buttons}.find(b => b.textContent == '{column}').click()")
    };
    let sorted = "document.querySelector('#columns [aria-sort]').textContent + ' ' + document.querySelector('#columns [aria-sort]').ariaSort";
    browser.value(&press("Panic")).await;
    browser.until(first, json!("ns/z")).await;
    assert_eq!(browser.value(sorted).await, json!("Panic descending"));
    browser.value(&press("Panic")).await;
    browser.until(first, json!("ns/quiet-000")).await;
    assert_eq!(browser.value(sorted).await, json!("Panic ascending"));
    let show = "const shown = document.getElementById('shown')";
    browser
        .value(&format!("{{ {show}; shown.value = 'panic'; shown.dispatchEvent(new Event('change')) }}"))
        .await;
    browser.until(number, json!(0)).await;
    browser.until("document.getElementById('more').textContent", json!("no key is like that")).await;
    browser.value(&format!("{{ {show}; shown.value = ''; shown.dispatchEvent(new Event('change')) }}")).await;
    browser.until(number, json!(100)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_to_a_key_that_is_not_there_says_so_until_it_is() {
    let server = StatServer::start(None).await;
    report(server.address, "a", 1).await;
    let mut browser = Browser::start(390, 800).await;
    browser.open(&format!("http://{}/#ns/later", server.address)).await;
    let absent = "document.getElementById('absent')";
    browser
        .until(
            &format!("!{absent}.hidden && {absent}.textContent.startsWith('There is no key ns/later:')"),
            json!(true),
        )
        .await;
    browser.until("document.querySelectorAll('#keys tr').length", json!(1)).await;
    browser.until("location.hash", json!("#ns/later")).await;
    report(server.address, "later", 1).await;
    browser.until("document.getElementById('chart-title').textContent", json!("ns/later")).await;
    assert_eq!(browser.value(&format!("{absent}.hidden")).await, json!(true));
    // On a narrow screen the tables scroll, and not the page.
    let overflow = "document.documentElement.scrollWidth <= innerWidth";
    assert_eq!(browser.value(overflow).await, json!(true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_is_no_zero_and_the_header_says_how_the_server_is() {
    let server = StatServer::with(None, &["--stable-window", "6s"]).await;
    // First: it may take longer to start than a gateway may be silent.
    let mut browser = Browser::start(1100, 900).await;
    Sender::gateway("gateway-1", "ns", "b").report(server.address, 5, 1).await;
    browser.open(&format!("http://{}/#ns/b", server.address)).await;
    browser.until(&format!("{}.split('|')[0]", row("b")), json!("1 gateway")).await;
    browser.until("document.querySelector('#keys tr')?.classList.contains('silent')", json!(true)).await;
    browser.until(&format!("{}.split('|')[1]", row("b")), json!("–")).await;
    // Several decisions later the line of the averages has not gone on, and that of the pods has.
    let end = |style: &str| {
        let path = format!("document.querySelector('svg path.{style}')");
        format!("(({path}?.getBBox().x ?? 0) + ({path}?.getBBox().width ?? 0))")
    };
    browser.until(&format!("{} - {} > 4", end("pods"), end("stable")), json!(true)).await;
    let history = http::get(server.address, "/v1/keys/ns/b/history").await.expect("a history");
    let history: Value = serde_json::from_str(&history).expect("JSON");
    let points = history["points"].as_array().expect("points");
    let zeros = points.iter().filter(|point| point["stable"] == 0.0).count();
    assert_eq!(zeros, 0, "{history}");
    assert!(points.iter().any(|point| point["stable"].is_null()), "{history}");

    let health = |text: &str| {
        format!("[...document.querySelectorAll('#health li')].some(i => i.textContent == '{text}')")
    };
    browser.until(&health("0 reports failed"), json!(true)).await;
    let answer = http::post(server.address, "/v1/reports", "application/x-bincode", vec![9].into()).await;
    assert_eq!(answer.expect("an answer").0, 400);
    browser.until(&health("1 reports failed"), json!(true)).await;
    let bad = "document.querySelector('#health .bad')?.textContent";
    browser.until(bad, json!("1 reports failed")).await;
}
