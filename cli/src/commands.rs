//! One file for each verb.

pub(crate) mod bench;
pub(crate) mod completions;
pub(crate) mod cp;
pub(crate) mod diff;
pub(crate) mod doctor;
pub(crate) mod exec;
pub(crate) mod gc;
pub(crate) mod gpu_helper;
pub(crate) mod help;
pub(crate) mod inspect;
pub(crate) mod key;
pub(crate) mod logs;
pub(crate) mod ls;
pub(crate) mod man;
pub(crate) mod pager;
pub(crate) mod pause;
pub(crate) mod ps;
pub(crate) mod restore;
pub(crate) mod rm;
pub(crate) mod run;
pub(crate) mod shim;
pub(crate) mod snapshot;
pub(crate) mod stop;
pub(crate) mod verify;
pub(crate) mod wait;
pub(crate) mod wake;
