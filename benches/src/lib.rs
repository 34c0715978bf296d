//! The benchmarks' common parts: CPU time of a process, medians, pinning.

use std::process::Command;

/// CPU seconds that a process has used so far, in all its threads.
///
/// # Panics
/// If the process is gone.
pub fn cpu_seconds(pid: u32) -> f64 {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    // The name may hold spaces, and ends with the last parenthesis; user and system time are fields 14 and 15.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: f64 = fields[11..13].iter().map(|field| field.parse::<f64>().expect("ticks")).sum();
    // SAFETY: sysconf has no preconditions.
    ticks / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64
}

/// The middle of the values, and how far the others lie from it: (median, lowest, highest).
///
/// # Panics
/// Without values.
pub fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1])
}

/// The value below which so large a share of the values lies.
///
/// # Panics
/// Without values.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() as f64 * share) as usize).min(sorted.len() - 1)]
}

/// Ties a process, with all its threads, to some cores.
///
/// # Panics
/// If there is no such core.
pub fn pin(pid: u32, cores: &str) {
    let done = Command::new("taskset").args(["-a", "-p", "-c", cores, &pid.to_string()]).output();
    let done = done.expect("taskset, of util-linux");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// What this was measured on: the processor, its cores, the day.
pub fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model =
        info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("an unknown processor");
    let cores = info.matches("processor\t").count();
    let date = Command::new("date")
        .arg("+%F")
        .output()
        .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    format!("{}, {cores} cores, {}", model.trim_start_matches(['\t', ' ', ':']), date.unwrap_or_default())
}
