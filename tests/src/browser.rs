//! A headless Chromium, controlled by its DevTools protocol.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::process::Process;
use crate::{debian, wait};

const SETTLED: Duration = Duration::from_secs(30);

/// A page in a browser of its own.
#[derive(Debug)]
pub struct Browser {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    session: String,
    calls: u64,
    /// Every URL that the page requested.
    pub asked: Vec<String>,
    #[allow(dead_code, reason = "held for its Drop")]
    process: Process,
    #[allow(dead_code, reason = "held for its Drop")]
    folder: TempDir,
}

impl Browser {
    /// Starts a browser, with an empty page of this size.
    ///
    /// # Panics
    /// If Chromium is not available, or does not start.
    pub async fn start(width: u32, height: u32) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = Command::new(debian("chromium", &["chromium", "fonts-dejavu-core"]));
        command.args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]);
        command.args(["--no-first-run", "--disable-background-networking", "--remote-debugging-port=0"]);
        command.arg(format!("--window-size={width},{height}"));
        command.arg(format!("--user-data-dir={}", folder.path().display())).arg("about:blank");
        command.env("HOME", folder.path()).env("TMPDIR", folder.path());
        let mut process = Process::start(&mut command, &folder.path().join("log"));
        let url = wait::until("Chromium listens", SETTLED, || {
            assert!(process.ended().is_none(), "Chromium ended at its start:\n{}", process.log());
            let log = process.log();
            async move {
                let url = log.split("DevTools listening on ").nth(1).and_then(|rest| rest.lines().next());
                url.map(str::to_owned).ok_or(log)
            }
        })
        .await;
        let (socket, _) = connect_async(url).await.expect("DevTools");
        let session = String::new();
        let mut browser = Self { socket, session, calls: 0, asked: Vec::new(), process, folder };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"})).await;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach).await;
        browser.session = attached["sessionId"].as_str().expect("a session").to_owned();
        browser.call("Network.enable", json!({})).await;
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        browser.call("Emulation.setDeviceMetricsOverride", size).await;
        browser
    }

    /// Calls a method of the protocol.
    ///
    /// # Panics
    /// If the call fails, or is not answered in time.
    pub async fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.calls += 1;
        let mut call = json!({"id": self.calls, "method": method, "params": parameters});
        if !self.session.is_empty() {
            call["sessionId"] = json!(self.session);
        }
        self.socket.send(Message::Text(call.to_string().into())).await.expect("sent");
        loop {
            let message = tokio::time::timeout(SETTLED, self.socket.next()).await.expect("an answer in time");
            let Message::Text(text) = message.expect("an answer").expect("a frame") else { continue };
            let mut answer: Value = serde_json::from_str(&text).expect("JSON");
            if answer["method"] == "Network.requestWillBeSent" {
                let url = answer["params"]["request"]["url"].as_str().expect("a URL");
                self.asked.push(url.to_owned());
            }
            if answer["id"] == self.calls {
                assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
                return answer["result"].take();
            }
        }
    }

    /// Goes to a URL.
    pub async fn open(&mut self, url: &str) {
        self.call("Page.navigate", json!({"url": url})).await;
    }

    /// Returns the value of a JavaScript expression.
    pub async fn value(&mut self, expression: &str) -> Value {
        let evaluated = json!({"expression": expression, "returnByValue": true});
        self.call("Runtime.evaluate", evaluated).await["result"]["value"].take()
    }

    /// Waits until an expression has this value.
    ///
    /// # Panics
    /// If it does not have the value in time; the message has the last value.
    pub async fn until(&mut self, expression: &str, wanted: Value) {
        let deadline = tokio::time::Instant::now() + SETTLED;
        loop {
            let value = self.value(expression).await;
            if value == wanted {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "{expression} is {value}, and not {wanted}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Presses and releases a key.
    pub async fn press(&mut self, key: &str, code: u32, text: &str) {
        let mut event = json!({"type": "keyDown", "key": key, "code": key, "windowsVirtualKeyCode": code});
        if !text.is_empty() {
            event["text"] = json!(text);
        }
        self.call("Input.dispatchKeyEvent", event.clone()).await;
        event["type"] = json!("keyUp");
        self.call("Input.dispatchKeyEvent", event).await;
    }

    /// Makes the page see a reader who prefers dark (or light).
    pub async fn prefers(&mut self, scheme: &str) {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": features})).await;
    }

    /// Writes a picture of the page to a PNG file.
    pub async fn screenshot(&mut self, file: &Path) {
        let picture = self.call("Page.captureScreenshot", json!({"format": "png"})).await;
        let base64 = picture["data"].as_str().expect("a picture").as_bytes();
        let digit = |c: u8| match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            _ => 63,
        };
        let mut bytes = Vec::new();
        for four in base64.chunks(4) {
            let digits: Vec<u8> = four.iter().filter(|c| **c != b'=').map(|c| digit(*c)).collect();
            let bits = digits.iter().fold(0_u32, |bits, digit| bits << 6 | u32::from(*digit));
            let bits = bits << (6 * (4 - digits.len()));
            bytes.extend(&bits.to_be_bytes()[1..digits.len()]);
        }
        std::fs::write(file, bytes).expect("a file");
    }
}
