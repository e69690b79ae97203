//! A store that fails, delays, truncates and corrupts on demand.
