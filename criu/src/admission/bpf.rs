//! Runs a filter program of seccomp on one system call, as the kernel would.
//!
//! A filter in the images is bytes from a store. Whether it denies what it must deny cannot be seen by comparing it with
//! another program, which another version of libseccomp lays out differently; running it tells.

/// `AUDIT_ARCH_X86_64`, as the program sees the architecture.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Words of `struct seccomp_data`: number, architecture, instruction pointer and six arguments of two words each.
const DATA_WORDS: usize = 16;
const SCRATCH_WORDS: usize = 16;

/// The lowest answer that lets the system call be executed: `SECCOMP_RET_LOG`. `SECCOMP_RET_ALLOW` is above it.
const ALLOWING: u32 = 0x7ffc_0000;

/// Whether the program lets a system call through whose arguments are all zero. A broken program, which the kernel
/// would not accept, counts as one that does.
pub(super) fn allows(program: &[u8], syscall: u32) -> bool {
    let mut data = [0_u32; DATA_WORDS];
    data[0] = syscall;
    data[1] = ARCHITECTURE;
    run(program, &data).is_none_or(|answer| answer & 0xffff_0000 >= ALLOWING)
}

struct Instruction {
    code: u16,
    if_true: usize,
    if_false: usize,
    k: u32,
}

fn instruction(program: &[u8], at: usize) -> Option<Instruction> {
    let bytes: [u8; 8] = program.get(at * 8..at * 8 + 8)?.try_into().ok()?;
    let [low, high, if_true, if_false, k @ ..] = bytes;
    let code = u16::from_le_bytes([low, high]);
    Some(Instruction { code, if_true: if_true.into(), if_false: if_false.into(), k: u32::from_le_bytes(k) })
}

/// The program's answer. Jumps only go forward, so it ends.
fn run(program: &[u8], data: &[u32; DATA_WORDS]) -> Option<u32> {
    let (mut a, mut x, mut at) = (0_u32, 0_u32, 0_usize);
    let mut scratch = [0_u32; SCRATCH_WORDS];
    loop {
        let Instruction { code, if_true, if_false, k } = instruction(program, at)?;
        at += 1;
        let word = k as usize;
        // Class, then mode or operation, then whether the operand is X (8) or the constant.
        let operand = if code & 8 == 0 { k } else { x };
        match code {
            // Loads into A: data word, length of the data, constant, scratch word.
            0x20 if k % 4 == 0 => a = *data.get(word / 4)?,
            0x80 => a = DATA_WORDS as u32 * 4,
            0x00 => a = k,
            0x60 => a = *scratch.get(word)?,
            // Loads into X.
            0x81 => x = DATA_WORDS as u32 * 4,
            0x01 => x = k,
            0x61 => x = *scratch.get(word)?,
            // Stores.
            0x02 => *scratch.get_mut(word)? = a,
            0x03 => *scratch.get_mut(word)? = x,
            // Arithmetic.
            0x04 | 0x0c => a = a.wrapping_add(operand),
            0x14 | 0x1c => a = a.wrapping_sub(operand),
            0x24 | 0x2c => a = a.wrapping_mul(operand),
            // The kernel answers 0 for a division by zero in X.
            0x34 | 0x3c => match a.checked_div(operand) {
                Some(quotient) => a = quotient,
                None => return Some(0),
            },
            0x44 | 0x4c => a |= operand,
            0x54 | 0x5c => a &= operand,
            0x64 | 0x6c => a = a.checked_shl(operand).unwrap_or(0),
            0x74 | 0x7c => a = a.checked_shr(operand).unwrap_or(0),
            0x84 => a = a.wrapping_neg(),
            0xa4 | 0xac => a ^= operand,
            // Jumps.
            0x05 => at = at.checked_add(word)?,
            0x15 | 0x1d => at += if a == operand { if_true } else { if_false },
            0x25 | 0x2d => at += if a > operand { if_true } else { if_false },
            0x35 | 0x3d => at += if a >= operand { if_true } else { if_false },
            0x45 | 0x4d => at += if a & operand != 0 { if_true } else { if_false },
            // Answers.
            0x06 => return Some(k),
            0x16 => return Some(a),
            // Moves between A and X.
            0x07 => x = a,
            0x87 => a = x,
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(instructions: &[(u16, u8, u8, u32)]) -> Vec<u8> {
        let bytes = |&(code, if_true, if_false, k): &(u16, u8, u8, u32)| {
            let [low, high] = code.to_le_bytes();
            let [a, b, c, d] = k.to_le_bytes();
            [low, high, if_true, if_false, a, b, c, d]
        };
        instructions.iter().flat_map(bytes).collect()
    }

    #[test]
    fn a_deny_list_denies_what_it_lists() {
        // Load the number; 425 gets ENOSYS, everything else is allowed.
        let filter = program(&[
            (0x20, 0, 0, 0),
            (0x15, 0, 1, 425),
            (0x06, 0, 0, 0x0005_0026),
            (0x06, 0, 0, 0x7fff_0000),
        ]);
        assert!(!allows(&filter, 425));
        assert!(allows(&filter, 1));
    }

    #[test]
    fn another_architecture_does_not_hide_a_hole() {
        // Kills foreign architectures, allows the rest.
        let filter = program(&[
            (0x20, 0, 0, 4),
            (0x15, 1, 0, ARCHITECTURE),
            (0x06, 0, 0, 0),
            (0x06, 0, 0, 0x7fff_0000),
        ]);
        assert!(allows(&filter, 425));
    }

    #[test]
    fn a_broken_program_denies_nothing() {
        assert!(allows(&[], 1), "no instruction");
        assert!(allows(&program(&[(0x20, 0, 0, 64)]), 1), "beyond the data");
        assert!(allows(&program(&[(0x05, 0, 0, u32::MAX)]), 1), "jump beyond the end");
        assert!(allows(&program(&[(0xffff, 0, 0, 0)]), 1), "unknown instruction");
        assert!(
            !allows(&program(&[(0x01, 0, 0, 0), (0x3c, 0, 0, 0), (0x06, 0, 0, 0x7fff_0000)]), 1),
            "division by zero"
        );
    }
}
