//! The seccomp profile that keeps a server restorable: calls whose results CRIU cannot carry do not exist inside.
//!
//! Libraries fall back where a call answers ENOSYS. It is no sandbox: everything else is allowed that the capabilities
//! allow.

use serde_json::{Value, json};

/// Linux's number for "no such system call".
const ENOSYS: u32 = 38;
/// Linux's number for "not permitted".
const EPERM: u32 = 1;
/// `arch_prctl` requests for permission to use AMX tiles, for oneself and for a guest.
const ARCH_REQ_XCOMP: [u64; 2] = [0x1023, 0x1025];

pub(super) fn profile() -> Value {
    let permission = ARCH_REQ_XCOMP.map(|request| {
        json!({
            "names": ["arch_prctl"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": EPERM,
            "args": [{ "index": 0, "value": request, "op": "SCMP_CMP_EQ" }],
        })
    });
    let mut rules = vec![json!({
        // Rings, other people's page faults, programs in the kernel, counters and keyrings have no image.
        "names": [
            "io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "bpf", "perf_event_open",
            "keyctl", "add_key", "request_key", "fanotify_init",
        ],
        "action": "SCMP_ACT_ERRNO",
        "errnoRet": ENOSYS,
    })];
    let mut profile = json!({ "defaultAction": "SCMP_ACT_ALLOW" });
    if cfg!(target_arch = "x86_64") {
        rules.extend(permission);
        // Without them libseccomp kills a 32-bit program at its first call.
        profile["architectures"] = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
    }
    profile["syscalls"] = rules.into();
    profile
}
