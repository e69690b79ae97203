//! One file for each verb, in the order of `--help`.

pub(crate) mod completions;
pub(crate) mod doctor;
pub(crate) mod help;
pub(crate) mod man;
