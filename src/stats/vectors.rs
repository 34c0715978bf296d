//! Tests against vectors: the recorded answers of the real Knative code, in `vectors/` at the
//! crate's root.

use std::time::Duration;

use crate::counting::request::Origin;
use crate::counting::snapshot::Snapshot;
use crate::protocol::frame::{self, FrameLimits};
use crate::protocol::gob;
use crate::protocol::stat::{Stat, WireStatMessage};
use crate::scaling::decider::{Decider, Observation};
use crate::scaling::settings::KeySettings;
use crate::scaling::windows::Window;

/// Returns the names of the files in the folder that begin and end so: whatever is put there is run.
fn files(begin: &str, end: &str) -> Vec<String> {
    let folder = std::fs::read_dir(format!("{}/vectors", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> =
        names.filter(|name| name.starts_with(begin) && name.ends_with(end)).collect();
    names.sort();
    assert!(!names.is_empty(), "no file {begin}*{end}");
    names
}

fn read(name: &str) -> String {
    let path = format!("{}/vectors/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn close(ours: f64, theirs: f64) -> bool {
    (ours - theirs).abs() <= 1e-6 * theirs.abs().max(1e-9)
}

/// Compares each report of a trace with the recorded one.
fn replay(name: &str) {
    let expected = read(&format!("{name}.expected.jsonl"));
    let mut expected = expected.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let mut now = Snapshot::default();
    let mut reported = now;
    let mut reports = 0;
    for line in read(&format!("{name}.trace")).lines() {
        let (at, event) = line.split_once(' ').unwrap();
        let at: u64 = at.parse().unwrap();
        match event {
            "Start" => {
                now = Snapshot::starting_at(at);
                reported = now;
            }
            "ReqIn" => now.request_in(at, Origin::Direct),
            "ReqOut" => now.request_out(at, Origin::Direct),
            "ProxiedIn" => now.request_in(at, Origin::Proxied),
            "ProxiedOut" => now.request_out(at, Origin::Proxied),
            "Report" => {
                now.advance(at);
                let period = now.since(&reported).unwrap();
                reported = now;
                reports += 1;
                let want = expected.next();
                let want = want.unwrap_or_else(|| panic!("{name}: report {reports} has no answer"));
                let ours = [
                    ("AverageConcurrency", period.average()),
                    ("AverageProxiedConcurrency", period.proxied_average()),
                    ("RequestCount", period.requests as f64),
                    ("ProxiedRequestCount", period.proxied_requests as f64),
                ];
                for (field, ours) in ours {
                    let theirs = want[field].as_f64().unwrap();
                    assert!(
                        close(ours, theirs),
                        "{name} report {reports} {field}: {ours}, expected {theirs}"
                    );
                }
            }
            other => panic!("{name}: unknown event {other}"),
        }
    }
    assert_eq!(expected.next(), None, "{name}: answers left over");
    assert!(reports > 0, "{name}: no report");
}

#[test]
fn every_request_stats_trace_comes_out_as_knatives() {
    for file in files("request_stats_", ".trace") {
        replay(file.trim_end_matches(".trace"));
    }
}

#[test]
fn every_window_average_comes_out_as_knatives() {
    let (mut stable, mut panic) = (Window::new(60), Window::new(6));
    let second = |ns: &str| ns.parse::<u64>().unwrap() / 1_000_000_000;
    let vectors = read("window_average.tsv");
    assert!(vectors.lines().count() > 0);
    for (number, line) in vectors.lines().enumerate() {
        let fields: Vec<&str> = line.split('\t').collect();
        let value: f64 = fields[1].parse().unwrap();
        for (window, want) in [(&mut stable, fields[3]), (&mut panic, fields[4])] {
            window.record(second(fields[0]), [value]);
            let ([ours], want) = (window.average(second(fields[2])), want.parse::<f64>().unwrap());
            assert!(close(ours, want), "line {}: {ours}, expected {want}", number + 1);
        }
    }
}

/// Returns the settings in a scenario's line.
fn settings(line: &str) -> KeySettings {
    let mut settings = KeySettings::DEFAULT;
    let mut target_per_pod = settings.target_per_pod();
    let seconds = |v: &str| Duration::from_secs(v.trim_end_matches('s').parse().unwrap());
    let (_, fields) = line.split_once(": ").unwrap_or_else(|| panic!("no settings: {line}"));
    for field in fields.split(' ') {
        let (name, value) = field.split_once('=').unwrap();
        let number = || value.parse::<f64>().unwrap();
        match name {
            "target" => target_per_pod = number(),
            "total" => settings.target = number(),
            "max_scale_up_rate" => settings.max_scale_up_rate = number(),
            "max_scale_down_rate" => settings.max_scale_down_rate = number(),
            "target_burst_capacity" => settings.target_burst_capacity = number(),
            "panic_threshold" => settings.panic_threshold_percentage = number() * 100.0,
            "stable_window" => settings.stable_window = seconds(value),
            "scale_down_delay" => settings.scale_down_delay = seconds(value),
            "activation_scale" => settings.activation_scale = value.parse().unwrap(),
            other => panic!("unknown setting {other}"),
        }
    }
    // Finds the utilization that gives the target exactly, to the last bit.
    let mut percentage = target_per_pod / settings.target * 100.0;
    (0..8).for_each(|_| percentage = percentage.next_down());
    for _ in 0..16 {
        settings.target_utilization_percentage = percentage;
        if settings.target_per_pod() == target_per_pod {
            return settings;
        }
        percentage = percentage.next_up();
    }
    panic!("no utilization gives {target_per_pod} of {}", settings.target);
}

/// Compares each decision of a file with the recorded one.
fn decide(name: &str) {
    let (mut setting, mut decider, mut steps) = (None, None, 0);
    for line in read(name).lines().skip(1) {
        if line.starts_with('#') {
            assert!(setting.is_none() || steps > 0, "{name}: no step before {line}");
            (setting, decider, steps) = (Some(settings(line)), None, 0);
            continue;
        }
        let setting = setting.as_ref().unwrap_or_else(|| panic!("{name}: no settings before {line}"));
        let fields: Vec<&str> = line.split('\t').collect();
        let number = |i: usize| fields[i].parse::<f64>().unwrap();
        let seen = Observation {
            now_ns: fields[1].parse().unwrap(),
            ready: number(2) as u32,
            stable: number(3),
            panic: number(4),
        };
        let decider = decider.get_or_insert_with(|| Decider::new(seen.now_ns, seen.ready));
        let ours = decider.decide(setting, &seen);
        let theirs = (number(5) as u32, number(6) as i64);
        if let Some(panic_mode) = fields.get(7) {
            assert_eq!(ours.panic_mode, *panic_mode == "1", "{name}, scenario {} at {seen:?}", fields[0]);
        }
        assert_eq!(
            (ours.desired_pods, ours.excess_burst_capacity),
            theirs,
            "{name}, scenario {} at {seen:?}",
            fields[0]
        );
        steps += 1;
    }
    assert!(steps > 0, "{name}: no step at the end");
}

#[test]
fn every_decision_comes_out_as_knatives() {
    files("kpa_decisions", ".tsv").iter().for_each(|file| decide(file));
}

#[test]
fn every_decision_keeps_to_knatives_published_rules() {
    files("kpa_rules", ".tsv").iter().for_each(|file| decide(file));
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |c: u8| (c as char).to_digit(16).unwrap() as u8;
    text.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

/// Returns a message from the JSON of the vectors. A missing field is zero.
fn message(json: &serde_json::Value, names: [&str; 5]) -> WireStatMessage {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned().into_bytes().into();
    let stat = &json["Stat"];
    let [pod, average, proxied_average, count, proxied_count] = names;
    let number = |name: &str| stat[name].as_f64().unwrap_or_default();
    WireStatMessage {
        namespace: text(&json["Key"]["Namespace"]),
        name: text(&json["Key"]["Name"]),
        stat: Some(Stat {
            pod_name: text(&stat[pod]),
            average_concurrent_requests: number(average),
            average_proxied_concurrent_requests: number(proxied_average),
            request_count: number(count),
            proxied_request_count: number(proxied_count),
            process_uptime: number("process_uptime"),
            timestamp: stat["timestamp"].as_i64().unwrap_or_default(),
        }),
    }
}

#[test]
fn every_frame_of_stats_decodes_as_knatives() {
    let names = [
        "pod_name",
        "average_concurrent_requests",
        "average_proxied_concurrent_requests",
        "request_count",
        "proxied_request_count",
    ];
    let vectors = read("wire_stat_messages.tsv");
    assert!(vectors.lines().count() > 0);
    for (number, line) in vectors.lines().enumerate() {
        let (hex, json) = line.split_once('\t').unwrap();
        let theirs: Vec<serde_json::Value> = serde_json::from_str(json).unwrap();
        let theirs: Vec<WireStatMessage> = theirs.iter().map(|json| message(json, names)).collect();
        assert_eq!(
            frame::decode(unhex(hex).into(), &FrameLimits::default()).unwrap(),
            theirs,
            "line {}",
            number + 1
        );
    }
}

/// Returns the instant of an RFC 3339 text in UTC.
fn instant(text: &str) -> gob::Time {
    let field = |range: std::ops::Range<usize>| text[range].parse::<i64>().unwrap();
    let (year, month, day) = (field(0..4), field(5..7), field(8..10));
    // Days since 1970-01-01. The year begins in March here, so that the leap day is its last day.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    let seconds = days * 86_400 + field(11..13) * 3600 + field(14..16) * 60 + field(17..19);
    let fraction = format!("{:0<9}", text[19..].trim_matches(['.', 'Z']));
    gob::Time { seconds, nanoseconds: fraction.parse().unwrap() }
}

#[test]
fn every_gob_message_decodes_as_the_seeds() {
    let names = [
        "PodName",
        "AverageConcurrentRequests",
        "AverageProxiedConcurrentRequests",
        "RequestCount",
        "ProxiedRequestCount",
    ];
    let vectors = read("gob_stat_message.tsv");
    assert!(vectors.lines().count() > 0);
    for (number, line) in vectors.lines().enumerate() {
        let (hex, json) = line.split_once('\t').unwrap();
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        let mut ours = gob::decode(&unhex(hex), gob::MAX_DEPTH).unwrap();
        assert_eq!(ours.time, instant(json["Stat"]["Time"].as_str().unwrap()), "line {}", number + 1);
        assert_eq!(
            frame::decode(unhex(hex).into(), &FrameLimits::default()).unwrap(),
            [ours.message.clone()],
            "told apart by its bytes"
        );
        ours.message.stat.as_mut().unwrap().timestamp = 0;
        assert_eq!(ours.message, message(&json, names), "line {}", number + 1);
    }
}
