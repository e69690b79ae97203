//! The side of the process that uses the device: its memory, its calls, and the thread that carries steps out.

pub(crate) mod custom;
mod moved;
pub(crate) mod refused;
pub(crate) mod virtual_memory;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::code;
use crate::control::Fault;
use crate::device::{self, Device, GRANULE, Memory};
use crate::page::{MAGIC, PAGE, Uuid, wake_signal};

const RUNNING: u32 = 0;
const LOCKED: u32 = 1;
const CHECKPOINTED: u32 = 2;
const FAILED: u32 = 3;
const CHECKPOINTING: u32 = 4;
const RESTORING: u32 = 5;
const STEP: Duration = Duration::from_micros(500);
const PAGE_BYTES: usize = 4096;
static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// What this process has on devices.
#[derive(Debug, Default)]
struct Held {
    /// By address.
    allocations: BTreeMap<usize, Allocation>,
    nodes: Vec<File>,
    /// The devices that were visible when it was checkpointed.
    visible: Vec<Device>,
    /// Address and length of the copy, while it is checkpointed.
    copy: Option<(usize, usize)>,
    context: bool,
    /// The checkpoint left the memory to the caller: so must the restore.
    away: bool,
    /// What a restore has taken for memory that the caller fills.
    taken: Vec<(usize, Uuid, Memory)>,
    /// What the caller is told.
    pieces: Vec<custom::Piece>,
    /// Address and length of reserved ranges.
    reserved: BTreeMap<usize, usize>,
    /// Memory that was made apart from an address, by handle.
    handles: BTreeMap<u64, Handle>,
    /// It has memory that no checkpoint takes along: managed, or shared with another process.
    refused: bool,
}

#[derive(Debug)]
struct Handle {
    device: Uuid,
    bytes: usize,
    /// Absent while it is mapped.
    memory: Option<Memory>,
}

#[derive(Debug)]
struct Allocation {
    device: Uuid,
    bytes: usize,
    /// Absent while it is checkpointed.
    memory: Option<Memory>,
    /// What it was mapped by, where that was apart from its making.
    handle: Option<u64>,
}

static HELD: Mutex<Option<Held>> = Mutex::new(None);
/// Calls that are being carried out, which a lock waits for.
static CALLS: AtomicUsize = AtomicUsize::new(0);
/// When the last kernel ends, in milliseconds of the monotonic clock.
static KERNEL_UNTIL: AtomicU64 = AtomicU64::new(0);

fn held() -> MutexGuard<'static, Option<Held>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call that a lock waits for.
struct Call;

impl Call {
    /// Blocks while the process is not running.
    fn enter() -> Self {
        loop {
            while PAGE.state.load(Ordering::SeqCst) != RUNNING {
                std::thread::sleep(STEP);
            }
            CALLS.fetch_add(1, Ordering::SeqCst);
            if PAGE.state.load(Ordering::SeqCst) == RUNNING {
                return Self;
            }
            CALLS.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        CALLS.fetch_sub(1, Ordering::SeqCst);
    }
}

fn now_ms() -> u64 {
    // SAFETY: all-zero is a valid timespec, which the call fills.
    let mut now: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: `now` is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

/// Opens the device nodes and starts the thread, unless there is a context.
pub(crate) fn context() -> u32 {
    let mut guard = held();
    let held = guard.get_or_insert_default();
    if held.context {
        return code::SUCCESS;
    }
    match device::open_nodes() {
        Ok(nodes) => held.nodes = nodes,
        Err(_) => return code::NO_DEVICE,
    }
    // The thread of a context that was given up before is still there.
    if PAGE.magic.load(Ordering::SeqCst) != MAGIC {
        let (told, tells) = std::sync::mpsc::channel();
        let start = std::thread::Builder::new().spawn(move || serve(&told));
        if start.is_err() || tells.recv().is_err() {
            return code::OPERATING_SYSTEM;
        }
    }
    held.context = true;
    code::SUCCESS
}

/// Gives everything back that the context had, when its last user has released it.
pub(crate) fn end_context() {
    let mut guard = held();
    let held = guard.get_or_insert_default();
    for (address, allocation) in std::mem::take(&mut held.allocations) {
        unmap(address, allocation.bytes);
    }
    held.nodes.clear();
    held.context = false;
}

/// Takes memory of the device with that number.
pub(crate) fn allocate(number: usize, bytes: usize) -> Result<usize, u32> {
    let _call = Call::enter();
    let device = device::all().into_iter().nth(number).ok_or(code::INVALID_DEVICE)?;
    if bytes == 0 {
        return Err(code::INVALID_VALUE);
    }
    let bytes = bytes.next_multiple_of(GRANULE);
    let memory = Memory::new(&device, bytes).map_err(|_| code::OUT_OF_MEMORY)?;
    let (address, _) = memory.map(None).map_err(|_| code::OUT_OF_MEMORY)?;
    let allocation = Allocation { device: device.uuid, bytes, memory: Some(memory), handle: None };
    held().get_or_insert_default().allocations.insert(address, allocation);
    Ok(address)
}

/// Gives memory back.
pub(crate) fn free(address: usize) -> u32 {
    let _call = Call::enter();
    let mut guard = held();
    let allocations = &mut guard.get_or_insert_default().allocations;
    if allocations.get(&address).is_none_or(|allocation| allocation.handle.is_some()) {
        return code::INVALID_VALUE;
    }
    let allocation = allocations.remove(&address).expect("looked at above");
    unmap(address, allocation.bytes);
    code::SUCCESS
}

/// Copies between device memory at `device` and host memory; `to_host` tells the direction.
///
/// # Safety
/// `host` must be valid for `bytes`.
pub(crate) unsafe fn copy(device: usize, host: *mut u8, bytes: usize, to_host: bool) -> u32 {
    let _call = Call::enter();
    let inside = {
        let mut guard = held();
        let below = guard.get_or_insert_default().allocations.range(..=device).next_back();
        below.is_some_and(|(start, allocation)| device + bytes <= start + allocation.bytes)
    };
    if !inside && !crate::custom::has_mapped(device, bytes) {
        return code::INVALID_VALUE;
    }
    let place: *mut u8 = std::ptr::with_exposed_provenance_mut(device);
    let (from, to) = if to_host { (place.cast_const(), host) } else { (host.cast_const(), place) };
    // SAFETY: inside a mapping that stays while the call is counted, and valid host memory by this function's contract.
    unsafe { std::ptr::copy(from, to, bytes) };
    code::SUCCESS
}

/// Starts a kernel that runs for so long.
pub(crate) fn launch(ms: u64) {
    let _call = Call::enter();
    KERNEL_UNTIL.fetch_max(now_ms() + ms, Ordering::SeqCst);
}

/// Waits for kernels.
pub(crate) fn synchronize() {
    let _call = Call::enter();
    while now_ms() < KERNEL_UNTIL.load(Ordering::SeqCst) {
        std::thread::sleep(STEP);
    }
}

/// How often a restore found something in the place of a device range.
pub(crate) fn clobbered() -> u32 {
    PAGE.clobbered.load(Ordering::SeqCst)
}

fn unmap(address: usize, bytes: usize) {
    // SAFETY: a mapping of this library that nothing refers to.
    unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(address), bytes) };
}

/// The restore thread: waits for its signal and carries one request out after another.
fn serve(ready: &std::sync::mpsc::Sender<()>) {
    // SAFETY: all-zero is a valid set, which the calls fill.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `all` is ours.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: as above; no old set is wanted.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut()) };
    // SAFETY: as above.
    let mut wake: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `wake` is ours.
    unsafe { libc::sigemptyset(&raw mut wake) };
    // SAFETY: `wake` is ours, the number valid.
    unsafe { libc::sigaddset(&raw mut wake, wake_signal()) };
    // SAFETY: plain calls without arguments.
    let (process, thread) = unsafe { (libc::getpid(), libc::gettid()) };
    // As the real driver's: `cuda` and eleven hexadecimal digits.
    let name = format!("cuda{process:011x}\0");
    // SAFETY: at most 16 bytes with the end.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    PAGE.owner.store(process, Ordering::SeqCst);
    PAGE.thread.store(thread, Ordering::SeqCst);
    PAGE.magic.store(MAGIC, Ordering::SeqCst);
    // The opener waits for exactly this.
    let _ = ready.send(());
    let limit = libc::timespec { tv_sec: 30, tv_nsec: 0 };
    loop {
        // SAFETY: both structures live until the call returns.
        unsafe { libc::sigtimedwait(&raw const wake, std::ptr::null_mut(), &raw const limit) };
        while PAGE.done.load(Ordering::SeqCst) != PAGE.asked.load(Ordering::SeqCst) {
            let result = carry_out();
            PAGE.result.store(result, Ordering::SeqCst);
            PAGE.done.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn carry_out() -> u32 {
    let fault = Fault::from_number(PAGE.fault.load(Ordering::SeqCst));
    match fault {
        Fault::Crash => {
            // SAFETY: none: this is the crash that was asked for.
            unsafe { std::ptr::null_mut::<u8>().write_volatile(0) };
        }
        Fault::Failed => {
            PAGE.state.store(FAILED, Ordering::SeqCst);
            return code::OPERATING_SYSTEM;
        }
        Fault::Broken => {
            PAGE.broken.store(1, Ordering::SeqCst);
            return code::OUT_OF_MEMORY;
        }
        Fault::None => {}
    }
    let state = PAGE.state.load(Ordering::SeqCst);
    match (PAGE.step.load(Ordering::SeqCst), state) {
        (0, RUNNING) => lock(Duration::from_millis(PAGE.timeout_ms.load(Ordering::SeqCst).into())),
        (1, LOCKED) if custom::wanted() => custom::begin_checkpoint(),
        (1, LOCKED) => checkpoint(),
        (4, CHECKPOINTING) => custom::end_checkpoint(),
        (4, RESTORING) => custom::end_restore(),
        (2, CHECKPOINTED) if PAGE.broken.load(Ordering::SeqCst) != 0 => code::OPERATING_SYSTEM,
        (2, CHECKPOINTED) if custom::wanted() => custom::begin_restore(),
        (2, CHECKPOINTED) => restore(),
        (3, LOCKED) => {
            PAGE.state.store(RUNNING, Ordering::SeqCst);
            code::SUCCESS
        }
        _ => code::ILLEGAL_STATE,
    }
}

fn lock(limit: Duration) -> u32 {
    let deadline = Instant::now() + limit;
    PAGE.state.store(LOCKED, Ordering::SeqCst);
    while CALLS.load(Ordering::SeqCst) > 0 || now_ms() < KERNEL_UNTIL.load(Ordering::SeqCst) {
        if Instant::now() > deadline {
            PAGE.state.store(RUNNING, Ordering::SeqCst);
            return code::NOT_READY;
        }
        std::thread::sleep(STEP);
    }
    code::SUCCESS
}

/// Waits as long as moving so much at the wanted rate takes beyond the time spent.
fn keep_rate(began: Instant, bytes: usize) {
    let rate = PAGE.rate.load(Ordering::SeqCst);
    if rate > 0 {
        let wanted = Duration::from_micros(bytes as u64 * 1_000_000 / (rate << 20));
        std::thread::sleep(wanted.saturating_sub(began.elapsed()));
    }
}

fn checkpoint() -> u32 {
    let began = Instant::now();
    let mut guard = held();
    let held = guard.get_or_insert_default();
    if held.is_refused() {
        return code::NOT_SUPPORTED;
    }
    let total: usize = held.allocations.values().map(|allocation| allocation.bytes).sum();
    if total > 0 {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        // SAFETY: a new mapping.
        let copy = unsafe { libc::mmap(std::ptr::null_mut(), total, protection, flags, -1, 0) };
        if copy == libc::MAP_FAILED {
            return code::OPERATING_SYSTEM;
        }
        let mut to = copy.cast::<u8>();
        for (address, allocation) in &mut held.allocations {
            let from: *const u8 = std::ptr::with_exposed_provenance(*address);
            // SAFETY: the copy has room for all allocations, and this one is mapped.
            unsafe { copy_touched(from, to, allocation.bytes) };
            // SAFETY: within the copy or just behind it.
            to = unsafe { to.add(allocation.bytes) };
            unmap(*address, allocation.bytes);
            allocation.memory = None;
        }
        held.copy = Some((copy.expose_provenance(), total));
    }
    held.visible = device::all();
    held.nodes.clear();
    keep_rate(began, total);
    PAGE.state.store(CHECKPOINTED, Ordering::SeqCst);
    code::SUCCESS
}

/// Copies, and leaves pages alone that are zero: those of a new mapping are as good, and whoever carries them elsewhere must not
/// believe that all of a copy was written.
///
/// # Safety
/// Both must be valid for `bytes`, a multiple of a page, and `to` be zero.
unsafe fn copy_touched(from: *const u8, to: *mut u8, bytes: usize) {
    for at in (0..bytes).step_by(PAGE_BYTES) {
        // SAFETY: inside of the first range.
        let page = unsafe { std::slice::from_raw_parts(from.add(at), PAGE_BYTES) };
        if page != ZEROS {
            // SAFETY: inside of both ranges, which do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(page.as_ptr(), to.add(at), PAGE_BYTES) };
        }
    }
}

impl Held {
    /// Whether a checkpoint is refused. Nothing is simulated for memory that has no address at this moment.
    fn is_refused(&self) -> bool {
        self.refused || self.handles.values().any(|handle| handle.memory.is_some())
    }

    /// Maps restored memory where it was.
    fn place(&mut self, filled: Vec<(usize, Uuid, Memory)>) -> Result<(), u32> {
        for (address, uuid, memory) in filled {
            let (_, clobbered) = memory.map(Some(address)).map_err(|_| code::OPERATING_SYSTEM)?;
            PAGE.clobbered.fetch_add(clobbered.into(), Ordering::SeqCst);
            let allocation = self.allocations.get_mut(&address).expect("taken from this map");
            allocation.device = uuid;
            allocation.memory = Some(memory);
        }
        Ok(())
    }
}

/// In two phases, so that a failed one can be repeated: everything is taken and filled, then mapped.
fn restore() -> u32 {
    let began = Instant::now();
    let mut guard = held();
    let held = guard.get_or_insert_default();
    if held.away {
        return code::INVALID_VALUE;
    }
    let places = match places(&held.visible) {
        Ok(places) => places,
        Err(code) => return code,
    };
    let Ok(nodes) = device::open_nodes() else { return code::NO_DEVICE };
    if moved::is_wanted(held) {
        if held.allocations.values().any(|one| !places.contains_key(&one.device)) {
            return code::INVALID_VALUE;
        }
        if let Err(code) = moved::restore(held, began) {
            return code;
        }
        held.nodes = nodes;
        PAGE.state.store(LOCKED, Ordering::SeqCst);
        return code::SUCCESS;
    }
    let mut from = held.copy.map_or(0, |(address, _)| address);
    let mut filled = Vec::new();
    for (address, allocation) in &held.allocations {
        let Some(device) = places.get(&allocation.device) else { return code::INVALID_VALUE };
        let Ok(memory) = Memory::new(device, allocation.bytes) else { return code::OUT_OF_MEMORY };
        if memory.fill(from).is_err() {
            return code::OPERATING_SYSTEM;
        }
        from += allocation.bytes;
        filled.push((*address, device.uuid, memory));
    }
    if let Err(code) = held.place(filled) {
        return code;
    }
    held.nodes = nodes;
    if let Some((address, bytes)) = held.copy.take() {
        unmap(address, bytes);
        keep_rate(began, bytes);
    }
    PAGE.state.store(LOCKED, Ordering::SeqCst);
    code::SUCCESS
}

/// Which device takes the place of which. A map names every device that was visible, once, each with another of its kind.
fn places(visible: &[Device]) -> Result<BTreeMap<Uuid, Device>, u32> {
    let now = device::all();
    let find = |uuid: &Uuid| now.iter().find(|device| device.uuid == *uuid).cloned();
    let count = PAGE.pair_count.load(Ordering::SeqCst) as usize;
    // SAFETY: the caller does not write between its request and the answer.
    let pairs = unsafe { *PAGE.pairs.0.get() };
    let mut places = BTreeMap::new();
    if count == 0 {
        for old in visible {
            places.insert(old.uuid, find(&old.uuid).ok_or(code::INVALID_VALUE)?);
        }
        return Ok(places);
    }
    if count != visible.len() {
        return Err(code::INVALID_VALUE);
    }
    for [old, new] in &pairs[..count.min(pairs.len())] {
        let was = visible.iter().find(|device| device.uuid == *old).ok_or(code::INVALID_VALUE)?;
        let becomes = find(new).ok_or(code::INVALID_VALUE)?;
        let taken = places.values().any(|device: &Device| device.uuid == *new);
        if taken || becomes.name != was.name || places.insert(*old, becomes).is_some() {
            return Err(code::INVALID_VALUE);
        }
    }
    Ok(places)
}
