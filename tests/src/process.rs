//! Child processes that cannot outlive this process. A child is killed when its value is dropped,
//! and by the kernel if this process itself is killed.

use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A child process, with its output in a file.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a process. Everything that it prints goes to `log`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let output = File::create(log).expect("a log file");
        command.stdin(Stdio::null()).stdout(output.try_clone().expect("a log file")).stderr(output);
        // SAFETY: prctl is safe between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        // In a process group of its own: Ctrl-C reaches only the demo, which ends its children in
        // order.
        command.process_group(0);
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        Self { child, log: log.into() }
    }

    /// Returns its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns what it has printed so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).expect("a process id");
        // SAFETY: the child has not been waited for, so the id is its own.
        unsafe { libc::kill(pid, signal) };
    }

    /// Returns its exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end. Returns its exit status.
    ///
    /// # Panics
    /// If it does not end within `limit`.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < deadline, "process {} did not end:\n{}", self.id(), self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills it at once, without a clean end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Returns its resident memory in bytes.
    ///
    /// # Panics
    /// If the process is gone.
    pub fn resident_bytes(&self) -> u64 {
        resident_bytes(self.id()).unwrap_or_else(|| panic!("process {} is gone", self.id()))
    }
}

/// Returns the resident memory of a process in bytes; `None` if the process is gone.
pub fn resident_bytes(id: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib * 1024)
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- the end of {}:", self.log.display());
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
        self.kill();
    }
}

/// Returns whether a process ended by itself with code 0.
pub fn is_clean(status: ExitStatus) -> bool {
    status.code() == Some(0) && status.signal().is_none()
}
