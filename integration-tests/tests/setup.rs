//! The scripts of `setup/`: what they do without a network, and those that are promises of their own.

mod offline;
mod scripts;
