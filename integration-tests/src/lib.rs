//! Whole-system tests, as a user.
