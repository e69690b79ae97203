//! The pager under a real CRIU: a program is dumped, its images lose their lazy pages, and it comes back.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rewarm_criu::config::Config;
use rewarm_criu::{Binary, log};
use rewarm_restore::pager::{Command, Heard, Holder, Mode, Report, Tasks};
use rewarm_sys::process;

use crate::images::Paging;
use crate::layout::{Random, Shape};
use crate::world::{PATIENCE, Role, World, seed, this_program, wait};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("real::comes_back_lazily", comes_back_lazily),
        Trial::test("real::comes_back_eagerly", comes_back_eagerly),
        Trial::test("real::a_killed_pager_leaves_no_wrong_page", a_killed_pager_leaves_no_wrong_page),
    ]
}

/// The CRIU to test with. A missing need is said, and fails where the environment says that it is met.
fn criu() -> Option<Binary> {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    let cache = std::env::var_os("REWARM_CACHE").map_or_else(
        || std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("rewarm"),
        PathBuf::from,
    );
    let found = Binary::find(None, Some(&cache.join("criu"))).ok();
    let need = if nix::unistd::geteuid().is_root() { "criu" } else { "root" };
    if found.is_none() || need == "root" {
        let met = std::env::var("REWARM_TEST_NEEDS").unwrap_or_default();
        assert!(
            !met.split(',').any(|met| met.trim() == need),
            "this machine should have {need}, and has not"
        );
        eprintln!("skipped: needs {need}");
        return None;
    }
    found
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A dumped program, its images and its pager.
struct Dumped {
    criu: Binary,
    folder: tempfile::TempDir,
    pid: i32,
    pager: Option<Child>,
    holder: Option<Holder>,
}

impl Drop for Dumped {
    fn drop(&mut self) {
        Tasks::Numbers(vec![self.pid]).kill();
        let _ = waitpid(Pid::from_raw(self.pid), None);
        drop(self.holder.take());
        if let Some(mut pager) = self.pager.take()
            && wait(&mut pager, Duration::from_secs(10)).is_none()
        {
            let _ = pager.kill();
            let _ = pager.wait();
        }
    }
}

impl Dumped {
    fn new(criu: Binary, shape: Shape) -> Dumped {
        // What CRIU restores becomes a child of the test, which can wait for its end then.
        process::become_subreaper().expect("a subreaper");
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["images", "work", "words"] {
            std::fs::create_dir(folder.path().join(name)).expect("a folder");
        }
        let words = folder.path().join("words");
        let mut program = this_program(&Role::Patient(shape, words.clone()));
        program.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        process::new_session(&mut program);
        let pid = i32::try_from(program.spawn().expect("a patient").id()).expect("pids are int");
        wait_for("the patient's memory", || words.join("ready").exists().then_some(()));
        let dumped = Dumped { criu, folder, pid, pager: None, holder: None };
        dumped.criu("dump", &Config::dump_to_images(), &["-t", &pid.to_string()]);
        let _ = waitpid(Pid::from_raw(pid), None);
        dumped
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn criu(&self, verb: &str, config: &Config, arguments: &[&str]) {
        let (conf, log) = (self.path("criu.conf"), self.path("work").join("criu.log"));
        config.write(&conf).expect("a configuration file");
        let mut program = Program::new(&self.criu.path);
        program.arg(verb).args(["-v4", "-o"]).arg(&log).arg("--config").arg(&conf).args(arguments);
        program.arg("-D").arg(self.path("images")).arg("-W").arg(self.path("work"));
        let mut child = program
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("criu starts");
        let status = wait(&mut child, PATIENCE).expect("criu ends in time");
        assert!(status.success(), "criu {verb}: {:?}, {:#?}", log::cause(&log), log::tail(&log));
    }

    fn start_pager(&mut self, mode: Mode, delay_us: u64) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let paging = Paging { images: self.path("images"), work: self.path("work"), mode, delay_us };
        let mut program = this_program(&Role::Images(paging));
        self.pager = Some(program.stdin(Stdio::from(OwnedFd::from(theirs))).spawn().expect("a pager"));
        self.holder = Some(Holder::new(ours));
        let socket = self.path("work").join("lazy-pages.socket");
        wait_for("the pager", || socket.exists().then_some(()));
    }

    fn restore(&self, config: Config) {
        self.criu("restore", &config.flag("lazy-pages"), &["-d"]);
    }

    /// Hears the pager to its end, as the shim does.
    fn hear_all(&mut self, eager: bool) -> Heard {
        loop {
            match self.holder.as_mut().expect("held").hear() {
                Heard::Report(Report::Finished) if eager => {
                    let stat = format!("/proc/{}/stat", self.pid);
                    let stopped = || std::fs::read_to_string(&stat).ok()?.contains(") T ").then_some(());
                    wait_for("the stop of the tree", stopped);
                    self.holder.as_ref().expect("held").tell(Command::Fill).expect("the pager listens");
                }
                Heard::Report(_) => {}
                Heard::Done(summary) => return Heard::Done(summary),
                Heard::Kill { chain } => {
                    assert!(Tasks::Numbers(vec![self.pid]).kill().is_empty(), "tasks outlive SIGKILL");
                    drop(self.holder.take());
                    return Heard::Kill { chain };
                }
            }
        }
    }

    fn say_check(&self) {
        std::fs::write(self.path("words").join("check"), "").expect("written");
    }

    fn found(&self) -> String {
        let path = self.path("words").join("found");
        wait_for("the patient's word", || std::fs::read_to_string(&path).ok())
    }

    fn huge_kib(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
    }
}

/// 64 MiB in two areas.
fn shape(dense: bool) -> Shape {
    Shape { seed: seed(), areas: 2, pages: 8192, dense }
}

fn comes_back_lazily() -> Result<(), Failed> {
    let Some(criu) = criu() else { return Ok(()) };
    let mut dumped = Dumped::new(criu, shape(false));
    dumped.start_pager(Mode::Lazy, 4000);
    dumped.say_check();
    dumped.restore(Config::restore());
    wait_for("the first page", || dumped.path("words").join("first").exists().then_some(()));
    let pages = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let early = pages(&PathBuf::from(format!("/proc/{}/statm", dumped.pid)));
    let resident: u64 = early.split_whitespace().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    let heard = dumped.hear_all(false);
    let Heard::Done(summary) = heard else { return Err(format!("{heard:?}").into()) };
    let found = dumped.found();
    if found != "right" {
        return Err(format!("{found}, {summary:?}").into());
    }
    let filled = (summary.background_bytes + summary.fault_bytes) / 4096;
    if resident * 2 > filled {
        return Err(format!("{resident} pages were there at the first touch, of {filled}").into());
    }
    Ok(())
}

fn comes_back_eagerly() -> Result<(), Failed> {
    let Some(criu) = criu() else { return Ok(()) };
    let mut dumped = Dumped::new(criu, shape(true));
    dumped.start_pager(Mode::Eager, 0);
    dumped.say_check();
    dumped.restore(Config::restore().leave_stopped());
    let heard = dumped.hear_all(true);
    let Heard::Done(summary) = heard else { return Err(format!("{heard:?}").into()) };
    let huge = dumped.huge_kib();
    World::signal(dumped.pid.unsigned_abs(), Signal::SIGCONT);
    let found = dumped.found();
    let thp = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if found != "right" || summary.eager_bytes < 60 << 20 {
        return Err(format!("{found}, {summary:?}").into());
    }
    if !thp.contains("[never]") && !thp.is_empty() && huge == 0 {
        return Err(format!("{huge} KiB in huge pages of {} bytes", summary.eager_bytes).into());
    }
    Ok(())
}

fn a_killed_pager_leaves_no_wrong_page() -> Result<(), Failed> {
    let Some(criu) = criu() else { return Ok(()) };
    let mut gone = 0;
    for _ in 0..3 {
        let mut dumped = Dumped::new(criu.clone(), shape(false));
        dumped.start_pager(Mode::Lazy, 4000);
        dumped.say_check();
        dumped.restore(Config::restore());
        let mut random = Random::new(seed());
        std::thread::sleep(Duration::from_micros(random.below(150_000)));
        World::signal(dumped.pager.as_ref().expect("started").id(), Signal::SIGKILL);
        if let Heard::Kill { .. } = dumped.hear_all(false) {
            gone += 1;
            let _ = waitpid(Pid::from_raw(dumped.pid), Some(WaitPidFlag::WNOHANG));
            let word = std::fs::read_to_string(dumped.path("words").join("found"));
            if word.as_ref().is_ok_and(|word| word != "right") {
                return Err(format!("{word:?}").into());
            }
        } else if dumped.found() != "right" {
            return Err(dumped.found().into());
        }
    }
    if gone == 0 { Err("no pager was killed before it was done".into()) } else { Ok(()) }
}
