//! Rounds of snapshot, restore, pause and wake under load, with faults of the driver at random.
//!
//! `REWARM_SOAK_ROUNDS` says how many; without it as many as fit into some seconds. `REWARM_SOAK_SEED` repeats a run.
//!
//! Rounds come in stretches. In the first no fault ends a helper or costs the server, so helper, shim and server live through all of it, and
//! what they hold is compared over all of it; in every other one after it no fault costs the server. The fetcher lives through all.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_gpu_sim::VERSION_ENV;
use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::load::Load;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, Rewarm, World, residue};

use super::world_with;

/// As long as a test may take among others.
const SHORT: Duration = Duration::from_secs(15);
/// Rounds until nothing that lives long grows any more by getting its first memory, and those that are needed to see growth.
const SETTLED: u64 = 3;
const ROUNDS_MIN: u64 = 5;
/// So many stretches has a run, of as many rounds each.
const STRETCHES: u64 = 4;
/// What each process may have more at the end than after the first rounds, in KiB: what comes and goes, and so much more for each round.
const GROWTH_KIB_MAX: u64 = 8 << 10;
const GROWTH_KIB_A_ROUND: u64 = 64;
/// How long a call of the driver may take here.
const PATIENCE: &str = "2s";
/// The fetcher waits for the next restore, longer than a round takes with all that may hang in it, so that one lives through all rounds; it
/// keeps two snapshots, which it has before it is looked at first.
const FETCHER: [(&str, &str); 2] = [("REWARM_FETCHER_IDLE", "2m"), ("REWARM_CACHE_MEMORY", "30MiB")];
/// What goes wrong and passes, with how often it may in one command: what the helper says and outlives, then what ends it.
const SAID: [&str; 5] =
    ["", "lock*1 result 600", "checkpoint*1 result 801", "restore*1 result 2", "unlock*1 then-result 401"];
const ENDING_HELPERS: [&str; 8] = [
    "lock*1 die",
    "lock*1 hang",
    "checkpoint*1 then-die",
    "checkpoint*1 then-hang",
    "restore*1 die",
    "restore*1 hang",
    "unlock*1 then-die",
    "unlock*1 hang",
];
/// What breaks the process in which it happens.
const FOR_GOOD: [&str; 5] =
    ["checkpoint*1 failed", "checkpoint*1 crash", "restore*1 oom", "restore*1 failed", "restore*1 crash"];
/// The same, where device memory goes past the server and its copy is made within a call: nothing leads back from the middle of it.
const FOR_GOOD_PAST_THE_SERVER: [&str; 4] =
    ["checkpoint*1 then-die", "checkpoint*1 then-hang", "complete*1 die", "complete*1 hang"];
/// Of so many faults one is for good.
const ONE_FOR_GOOD: usize = 6;

/// What may go wrong in a stretch of rounds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Weather {
    /// Nothing that ends a helper.
    Still,
    /// Nothing that costs the server.
    Calm,
    /// Everything.
    Rough,
}

impl Weather {
    fn of(stretch: u64) -> Self {
        match stretch {
            0 => Self::Still,
            stretch if stretch.is_multiple_of(2) => Self::Calm,
            _ => Self::Rough,
        }
    }

    fn fault(self, dice: &mut Dice, way: Way) -> &'static str {
        if self == Self::Rough && dice.roll(ONE_FOR_GOOD) == 0 {
            let all = way.for_good();
            return all[dice.roll(all.len())];
        }
        let ending = if self == Self::Still { 0 } else { ENDING_HELPERS.len() };
        let passing = dice.roll(SAID.len() + ending);
        let fault = SAID.get(passing).copied().unwrap_or_else(|| ENDING_HELPERS[passing - SAID.len()]);
        let ends_helper = self == Self::Still && way.ends_helper(fault);
        if ends_helper || way.for_good().contains(&fault) { "" } else { fault }
    }
}

/// Which way device memory goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Through the server's own memory.
    Within,
    /// Past it.
    Direct,
}

impl Way {
    /// Of the snapshots of each tag every second one goes past the server.
    fn of(round: u64) -> Self {
        if (round / 2).is_multiple_of(2) { Self::Within } else { Self::Direct }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Within => &[],
            Self::Direct => &["--gpu-direct"],
        }
    }

    /// Whether a refusal ends the helper: one that has device memory of the server mapped gives it back with its end only.
    fn ends_helper(self, fault: &str) -> bool {
        self == Self::Direct && ["checkpoint", "restore"].iter().any(|call| fault.starts_with(call))
    }

    /// What breaks the process in which it happens.
    fn for_good(self) -> Vec<&'static str> {
        let direct = FOR_GOOD_PAST_THE_SERVER.iter().filter(|_| self == Self::Direct);
        FOR_GOOD.iter().chain(direct).copied().collect()
    }
}

/// Numbers from a seed: SplitMix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((word ^ (word >> 31)) % sides as u64).expect("small")
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Descriptors and resident memory in KiB of a process. Of the server it is private memory: its device memory is shared memory here, of
/// which as much is resident as was touched since the last wake, and which is looked at by itself.
fn size(pid: u64, command: &str) -> (usize, u64) {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = if kind(command) == "server" { "RssAnon:" } else { "VmRSS:" };
    let kib = status.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB"));
    (fds, kib.and_then(|kib| kib.trim().parse().ok()).unwrap_or(0))
}

/// The sizes of all processes that live long: shim, helper and server of the source, the fetcher and its workers. Taken when the shim has
/// its helper, which a fault may have taken, and no connection that is just being closed.
fn at_rest(world: &World, source: &Replica<'_>) -> BTreeMap<String, (usize, u64)> {
    for verb in ["pause", "wake"] {
        world.rewarm().args([verb, source.name()]).ok();
    }
    let mut least = BTreeMap::new();
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(100));
        let all = residue::processes(world.id()).into_iter().chain(residue::services(world.id()));
        let of = |(pid, command): (i32, String)| {
            (format!("{pid} {command}"), size(pid.unsigned_abs().into(), &command))
        };
        for (process, (fds, kib)) in all.map(of) {
            let seen = least.entry(process).or_insert((fds, kib));
            *seen = (seen.0.min(fds), seen.1.min(kib));
        }
    }
    least
}

/// What a process held when it had got its first memory, and in which round that was.
struct Baseline {
    round: u64,
    fds: usize,
    kib: u64,
}

/// Baselines of all processes that live long, each for as long as that process lives.
#[derive(Default)]
struct Watch {
    baselines: BTreeMap<String, Baseline>,
    /// The most rounds over which a process of each kind was compared.
    longest: BTreeMap<&'static str, u64>,
    /// The most KiB that one of each kind had more than at first.
    growth: BTreeMap<&'static str, u64>,
}

impl Watch {
    /// Compares what is there with the baselines, and takes one of each process that has none.
    fn look(&mut self, world: &World, source: &Replica<'_>, round: u64) {
        let now = at_rest(world, source);
        self.baselines.retain(|process, _| now.contains_key(process));
        for (process, (fds, kib)) in now {
            let first = self.baselines.entry(process.clone()).or_insert(Baseline { round, fds, kib });
            let began =
                format!("{} descriptors and {} KiB after round {}", first.fds, first.kib, first.round);
            let held = format!("{process}: {began}, {fds} and {kib} after round {round}");
            assert!(fds <= first.fds, "{held}");
            let (growth, rounds) = (kib.saturating_sub(first.kib), round - first.round);
            assert!(growth <= GROWTH_KIB_MAX + GROWTH_KIB_A_ROUND * rounds, "{held}");
            let longest = self.longest.entry(kind(&process)).or_default();
            *longest = (*longest).max(rounds);
            let most = self.growth.entry(kind(&process)).or_default();
            *most = (*most).max(growth);
        }
    }
}

/// What a process is, by its command line.
fn kind(process: &str) -> &'static str {
    [("fetcher", " fetcher "), ("pager", " pager"), ("helper", "gpu-helper"), ("shim", " shim ")]
        .into_iter()
        .find_map(|(kind, words)| process.contains(words).then_some(kind))
        .unwrap_or("server")
}

/// A call whose replica finds a driver that knows both ways, and does not wait for it long.
fn seen_by(devices: &Devices, call: Rewarm) -> Rewarm {
    devices.seen_by(call).env(VERSION_ENV, "13040").env("REWARM_GPU_PATIENCE", PATIENCE)
}

/// A server under load that is restarted where a fault has broken it for good.
struct Source<'w> {
    world: &'w World,
    devices: &'w Devices,
    server: Server,
    replica: Replica<'w>,
    load: Load,
    answers: usize,
    restarts: usize,
    /// The rounds that its shim has seen.
    rounds: u64,
}

impl<'w> Source<'w> {
    fn start(world: &'w World, devices: &'w Devices) -> Self {
        let server = devices.server(16);
        let (replica, load) = Self::run(world, devices, &server);
        Self { world, devices, server, replica, load, answers: 0, restarts: 0, rounds: 0 }
    }

    fn run(world: &'w World, devices: &'w Devices, server: &Server) -> (Replica<'w>, Load) {
        let name = world.name("device");
        let call = seen_by(devices, world.run_call(&name, server, &[]));
        let replica = Replica::of_run(world, name, server.port, &call.ok());
        let load = Load::posting(replica.port(), "/generate", "under load");
        (replica, load)
    }

    fn status(&self) -> String {
        let entry = self.replica.entry().expect("it is listed");
        entry["status"].as_str().expect("text").to_owned()
    }

    /// Whether its first process is there and has not ended.
    fn lives(&self) -> bool {
        let pid = self.replica.entry().expect("it is listed")["pid"].clone();
        // What has ended has no memory any more.
        std::fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| !maps.is_empty())
    }

    /// What a fault for good has killed is seen to have ended a moment later.
    fn settled(&self) -> String {
        let mut status = self.status();
        self.world.await_state("the server answers, or shows as what it is", Duration::from_secs(10), || {
            let answers = || self.replica.ask("GET", "/health", None).is_ok_and(|it| it.status == 200);
            // What has died within a wake shows as paused until its end is seen.
            let settled = match &status[..] {
                "ready" => answers(),
                "paused" => self.lives(),
                _ => true,
            };
            status = self.status();
            settled
        });
        status
    }

    /// One command with a fault of the driver. What passes leaves the server serving, or paused where a restore was needed and did not
    /// succeed; what is for good may cost it. True: the command was done.
    fn tried(&mut self, way: Way, rule: &str, call: Rewarm) -> bool {
        self.devices.control(rule);
        let output = call.run();
        self.devices.control("");
        let for_good = way.for_good().contains(&rule);
        let (code, status) = (output.code, if for_good { self.settled() } else { self.status() });
        // 6: a snapshot whose server did not get its devices back, and is paused.
        assert!(matches!(code, Some(0 | 1 | 6)), "{rule:?}: neither done nor undone: {output}");
        match &status[..] {
            "ready" | "paused" if !for_good => {}
            "ready" | "paused" if code != Some(6) => {}
            _ if for_good => self.restart(),
            _ => panic!("{rule:?} passes, but the server is {status}: {output}"),
        }
        code == Some(0)
    }

    /// Ends what is broken; its clients may have heard that, and no wrong answer.
    fn restart(&mut self) {
        self.restarts += 1;
        self.rounds = 0;
        if self.status() != "exited" {
            self.world.rewarm().args(["stop", self.replica.name()]).ok();
        }
        self.world.rewarm().args(["rm", self.replica.name()]).ok();
        let (replica, load) = Self::run(self.world, self.devices, &self.server);
        self.replica = replica;
        let seen = std::mem::replace(&mut self.load, load).stop();
        assert_eq!(seen.wrong, [] as [&str; 0]);
        self.answers += seen.answers;
    }

    /// Awake again, as somebody would see to it.
    fn awake(&mut self) {
        if self.status() == "paused" {
            let output = self.world.rewarm().args(["wake", self.replica.name()]).run();
            match output.code {
                Some(0) => {}
                Some(6) => self.restart(),
                _ => panic!("no fault is left: {output}"),
            }
        }
    }
}

#[test]
#[expect(clippy::print_stderr, reason = "over how many rounds was compared")]
fn rounds_of_snapshot_restore_pause_and_wake_with_faults() {
    let Some((world, devices)) = world_with(&[128]) else { return };
    let (rounds, seed) = (number("REWARM_SOAK_ROUNDS"), number("REWARM_SOAK_SEED").unwrap_or(7));
    let mut dice = Dice(seed);
    let stretch = (rounds.unwrap_or(0) / STRETCHES).max(ROUNDS_MIN);
    let mut source = Source::start(&world, &devices);
    let server = source.server.clone();
    let before = answers(&source.replica, &server);
    let used = devices.used_mib(0);
    let began = Instant::now();
    let (mut round, mut watch) = (0, Watch::default());
    // Snapshots of each way that came back.
    let mut carried: BTreeMap<&[&str], u64> = BTreeMap::new();
    while rounds.map_or_else(
        || round < ROUNDS_MIN || began.elapsed() < SHORT,
        |rounds| round < rounds.max(ROUNDS_MIN),
    ) {
        let (weather, restarts) = (Weather::of(round / stretch), source.restarts);
        round += 1;
        for verb in ["pause", "wake"] {
            if verb == "wake" && source.status() != "paused" {
                continue;
            }
            let fault = weather.fault(&mut dice, Way::Within);
            source.tried(Way::Within, fault, world.rewarm().args([verb, source.replica.name()]));
        }
        source.awake();
        server_answers_as_before(&source.replica, &server, &before);
        let tag = format!("v{}", round % 2);
        let way = Way::of(round);
        let snapshot = world.snapshot_call(&source.replica, &tag, way.flags());
        let published = source.tried(way, weather.fault(&mut dice, way), snapshot);
        source.awake();
        server_answers_as_before(&source.replica, &server, &before);
        if published {
            let name = world.name("clone");
            let restore = || {
                let call = world.restore_call("device", &tag, server.port, &["--name", &name]);
                let call = FETCHER.into_iter().fold(call, |call, (name, value)| call.env(name, value));
                seen_by(&devices, call)
            };
            // What breaks a clone costs the source nothing.
            devices.control(Weather::Rough.fault(&mut dice, way));
            let output = restore().run();
            devices.control("");
            assert!(matches!(output.code, Some(0 | 1)), "neither done nor undone: {output}");
            let output = if output.code == Some(0) { output } else { restore().ok() };
            let clones = Replica::of_restore(&world, server.port, &output);
            server_answers_as_before(&clones[0], &server, &before);
            clones[0].remove();
            *carried.entry(way.flags()).or_default() += 1;
        }
        assert_eq!(devices.used_mib(0), used, "round {round} of seed {seed}");
        assert!(
            weather == Weather::Rough || source.restarts == restarts,
            "round {round} of seed {seed}: a fault that passes cost the server"
        );
        source.rounds += 1;
        if source.rounds == SETTLED || round % stretch == 0 {
            watch.look(&world, &source.replica, round);
        }
    }
    watch.look(&world, &source.replica, round);
    eprintln!(
        "{round} rounds of seed {seed}, {} restarts; compared over so many: {:?}; most KiB more: {:?}; snapshots: {carried:?}",
        source.restarts, watch.longest, watch.growth
    );
    for kind in ["fetcher", "helper", "server", "shim"] {
        let compared = watch.longest.get(kind).copied().unwrap_or(0);
        assert!(compared >= stretch - SETTLED, "{kind}: compared over {compared} rounds");
    }
    let seen = source.load.stop();
    assert_eq!((seen.wrong, seen.failures), (Vec::new(), Vec::new()), "seed {seed}");
    assert!(seen.answers + source.answers > 0);
    // It would wait for minutes.
    for (pid, _) in residue::services(world.id()) {
        // A worker that has ended with its keeper already is what is wanted.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    world.finish();
}
