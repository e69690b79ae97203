//! `rewarm gpu-helper`, hidden: makes the CUDA driver's calls for one shim.

use crate::env;

pub(crate) fn run() -> u8 {
    rewarm_gpu::helper::main(&env::libcuda(), &env::libnvml())
}
