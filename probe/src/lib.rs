//! Asks a server questions and compares the answers: ready checks, hooks, recorded probes.
