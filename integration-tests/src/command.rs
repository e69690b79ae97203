//! One call of the `rewarm` program: its arguments, its environment, what it printed and how it ended.

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use serde_json::Value;

/// Longest time a call may take if the test does not say otherwise. The slowest (a transformer on two busy cores) takes
/// a quarter of it.
const TIMEOUT: Duration = Duration::from_secs(120);
/// How long after the end of the program its output may stay open. Whoever keeps it open for longer makes
/// `rewarm run ... | cat` hang.
const OUTPUT_OPEN_MAX: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(5);

/// A call that is being put together.
#[derive(Debug)]
pub struct Rewarm {
    command: Command,
    input: Vec<u8>,
    timeout: Duration,
    shown: String,
    /// There as long as the program is to pause.
    pause: Option<tempfile::NamedTempFile>,
}

impl Rewarm {
    pub(crate) fn new(program: &Path) -> Self {
        let mut command = Command::new(program);
        command.arg0("rewarm");
        Self { command, input: Vec::new(), timeout: TIMEOUT, shown: "rewarm".to_owned(), pause: None }
    }

    /// A call of another program, such as a script that calls `rewarm`.
    pub(crate) fn script(program: &Path) -> Self {
        let shown = program.display().to_string();
        Self { command: Command::new(program), shown, ..Self::new(program) }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<std::ffi::OsStr>) -> Self {
        self.shown += " ";
        self.shown += &arg.as_ref().to_string_lossy();
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<T: AsRef<std::ffi::OsStr>>(self, args: impl IntoIterator<Item = T>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Sets a variable of the program's environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Takes a variable out of the program's environment.
    #[must_use]
    pub fn env_remove(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    /// What the program reads from its standard input; nothing by default.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    /// Runs the program as another user.
    #[must_use]
    pub fn user(mut self, uid: u32, gid: u32) -> Self {
        self.command.uid(uid).gid(gid);
        self
    }

    /// Starts another program that starts `rewarm`, such as `prlimit` or `capsh`; `prefix` are its arguments.
    #[must_use]
    pub fn under(self, program: &str, prefix: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(prefix).arg(self.command.get_program()).args(self.command.get_args());
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        Self { command, ..self }
    }

    /// The call as a shell script, environment included.
    #[must_use]
    pub fn as_script(&self) -> String {
        let quoted = |text: &std::ffi::OsStr| format!("'{}'", text.to_string_lossy().replace('\'', r"'\''"));
        let mut script = String::new();
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => script += &format!("export {}={}\n", name.to_string_lossy(), quoted(value)),
                None => script += &format!("unset {}\n", name.to_string_lossy()),
            }
        }
        script += &quoted(self.command.get_program());
        for argument in self.command.get_args() {
            script += " ";
            script += &quoted(argument);
        }
        script + "\n"
    }

    /// Longest time the program may take.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Makes the program stop for a while at the beginning of a stage and say `paused at STAGE`, until [`Running::go_on`].
    ///
    /// # Panics
    ///
    /// When there is no room for an empty file.
    #[must_use]
    pub fn pause_at(mut self, stage: rewarm_report::Stage) -> Self {
        let pause = tempfile::NamedTempFile::new().expect("an empty file");
        let said = format!("{}={}", stage.name(), pause.path().display());
        self.pause = Some(pause);
        self.env("REWARM_TEST_PAUSE_AT", said)
    }

    /// Starts the program and does not wait for it.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn spawn(mut self) -> Running {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().unwrap_or_else(|error| panic!("start {}: {error}", self.shown));
        let mut stdin = child.stdin.take().expect("piped");
        let input = std::mem::take(&mut self.input);
        // A thread of its own: a program that does not read its input must not block the test. A broken pipe is the
        // program's right.
        std::thread::spawn(move || drop(stdin.write_all(&input)));
        let stdout = Stream::collect(child.stdout.take().expect("piped"));
        let stderr = Stream::collect(child.stderr.take().expect("piped"));
        let began = Instant::now();
        let pause = self.pause.take();
        Running { child, stdout, stderr, began, timeout: self.timeout, shown: self.shown, pause }
    }

    /// Starts the program and waits for its end.
    pub fn run(self) -> Output {
        self.spawn().wait()
    }

    /// Runs the program, which must end with 0.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub fn ok(self) -> Output {
        let output = self.run();
        output.expect_code(0);
        output
    }

    /// Runs the program, which must end with `code`.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub fn fails(self, code: i32) -> Output {
        let output = self.run();
        output.expect_code(code);
        output
    }
}

/// What one of the program's two outputs brought so far.
#[derive(Debug, Clone)]
struct Stream {
    shared: Arc<(Mutex<Collected>, Condvar)>,
}

#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

impl Stream {
    fn collect(mut source: impl Read + Send + 'static) -> Self {
        let stream = Self { shared: Arc::default() };
        let shared = Arc::clone(&stream.shared);
        std::thread::spawn(move || {
            let mut buffer = [0; 8192];
            loop {
                let count = source.read(&mut buffer).unwrap_or(0);
                let mut collected = shared.0.lock().expect("no panic while collecting");
                collected.bytes.extend_from_slice(&buffer[..count]);
                collected.ended = count == 0;
                shared.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        stream
    }

    /// Waits until `done` says so or the time is over, and tells which of the two.
    fn wait(&self, timeout: Duration, done: impl Fn(&Collected) -> bool) -> bool {
        let guard = self.shared.0.lock().expect("no panic while collecting");
        let (_guard, result) = self
            .shared
            .1
            .wait_timeout_while(guard, timeout, |collected| !done(collected))
            .expect("no panic while collecting");
        !result.timed_out()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.0.lock().expect("no panic while collecting").bytes).into_owned()
    }
}

/// A program that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: Stream,
    stderr: Stream,
    began: Instant,
    timeout: Duration,
    shown: String,
    pause: Option<tempfile::NamedTempFile>,
}

impl Running {
    /// Ends the pause of [`Rewarm::pause_at`].
    pub fn go_on(&mut self) {
        self.pause = None;
    }

    /// Process id of the program.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids are positive and fit")
    }

    /// What it printed to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What it printed to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Waits until standard error contains `text`.
    ///
    /// # Panics
    ///
    /// When the program ends or its time is over before.
    pub fn await_stderr(&self, text: &str) {
        let contains = |collected: &Collected| String::from_utf8_lossy(&collected.bytes).contains(text);
        let seen = self.stderr.wait(self.timeout, |collected| collected.ended || contains(collected));
        let all = self.stderr.text();
        assert!(seen && all.contains(text), "{}: waited for {text:?} and saw\n{all}", self.shown);
    }

    /// Waits until standard output contains `text`.
    ///
    /// # Panics
    ///
    /// When the program ends or its time is over before.
    pub fn await_stdout(&self, text: &str) {
        let contains = |collected: &Collected| String::from_utf8_lossy(&collected.bytes).contains(text);
        let seen = self.stdout.wait(self.timeout, |collected| collected.ended || contains(collected));
        let all = self.stdout.text();
        assert!(
            seen && all.contains(text),
            "{}: waited for {text:?} and saw\n{all}\n{}",
            self.shown,
            self.stderr()
        );
    }

    /// Sends a signal to the program alone.
    pub fn signal(&self, signal: Signal) {
        // It may have ended by itself a moment ago; the test looks at its exit status anyway.
        let _ = signal::kill(Pid::from_raw(self.pid()), signal);
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// When its time is over before (it is killed then), or its output stays open after its end.
    #[must_use]
    pub fn wait(mut self) -> Output {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                break status;
            }
            if self.began.elapsed() > self.timeout {
                let (out, err) = (self.stdout(), self.stderr());
                panic!("{} took more than {:?}\nstdout: {out}\nstderr: {err}", self.shown, self.timeout);
            }
            std::thread::sleep(POLL);
        };
        let took = self.began.elapsed();
        let closed = self.stdout.wait(OUTPUT_OPEN_MAX, |collected| collected.ended)
            && self.stderr.wait(OUTPUT_OPEN_MAX, |collected| collected.ended);
        let output = Output {
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout(),
            stderr: self.stderr(),
            took,
            shown: self.shown.clone(),
        };
        assert!(closed, "somebody keeps the output open after the end of the program\n{output}");
        output
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// How a call ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code, absent when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// From the start to the end of the program.
    pub took: Duration,
    shown: String,
}

impl Output {
    /// Asserts the exit code.
    ///
    /// # Panics
    ///
    /// When it is another one.
    pub fn expect_code(&self, code: i32) {
        assert_eq!(self.code, Some(code), "exit code of\n{self}");
    }

    /// Asserts that standard error contains every one of `words`.
    ///
    /// # Panics
    ///
    /// When one is missing.
    pub fn says(&self, words: &[&str]) -> &Self {
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is missing in the message of\n{self}");
        }
        self
    }

    /// The last line of standard output that is a JSON object, or standard output as a whole.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|_| {
            self.json_lines().pop().unwrap_or_else(|| panic!("no JSON on standard output of\n{self}"))
        })
    }

    /// Every line of standard output that is a JSON object.
    #[must_use]
    pub fn json_lines(&self) -> Vec<Value> {
        self.stdout
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(Value::is_object)
            .collect()
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.shown)?;
        writeln!(f, "ended with code {:?}, signal {:?} after {:?}", self.code, self.signal, self.took)?;
        writeln!(f, "stdout: {}", self.stdout)?;
        write!(f, "stderr: {}", self.stderr)
    }
}
