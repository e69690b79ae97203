//! `rewarm serve`: pools of real replicas behind a real gateway, as clients and operators see them.

mod pool;
