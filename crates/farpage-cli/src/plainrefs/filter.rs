//! The seccomp filter: which system calls the keeper is asked about before they run.
//!
//! Everything else is allowed without delay; calls that are allowed whatever their arguments do not even reach the
//! filter (the kernel keeps a bitmap of them).

/// What a call may leave behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Plain references to pages of the caller.
    Pages,
    /// A descriptor (inherited over `exec`, passed on) through which later calls leave plain references.
    Carrier,
    /// An io_uring: a carrier, unless the manager makes it.
    Ring,
    /// O_DIRECT on the path in the second argument, from the directory in the first.
    DirectAt,
    /// O_DIRECT on the path in the first argument.
    Direct,
    /// Perhaps O_DIRECT: the flags are in memory (third argument), else as `DirectAt`.
    DirectHow,
    /// O_DIRECT on the descriptor in the first argument.
    DirectSet,
}

/// A condition on an argument (its low 32 bits: all that these calls look at).
#[derive(Debug, Clone, Copy)]
enum Cond {
    /// Argument has this value.
    Is(u8, u32),
    /// Argument has one of these bits.
    Has(u8, u32),
}
use Cond::{Has, Is};

/// A call and the alternatives that matter, each a conjunction.
type Rule = (u32, Kind, &'static [&'static [Cond]]);

const ALWAYS: &[&[Cond]] = &[&[]];
const MSG_ZEROCOPY: u32 = 0x400_0000;
const SO_ZEROCOPY: u32 = 60;
const TCP_ULP: u32 = 31;
const DIRECT: u32 = libc::O_DIRECT as u32;
const SETFL: Cond = Is(1, libc::F_SETFL as u32);
const ZEROCOPY_OPTION: &[&[Cond]] = &[&[Is(1, libc::SOL_SOCKET as u32), Is(2, SO_ZEROCOPY)]];
/// Kernel TLS encrypts from, and decrypts into, pages that it holds by plain reference.
const ULP_OPTION: &[Cond] = &[Is(1, libc::IPPROTO_TCP as u32), Is(2, TCP_ULP)];
const OPTIONS: &[&[Cond]] = &[ZEROCOPY_OPTION[0], ULP_OPTION];

const fn nr(n: libc::c_long) -> u32 {
    n as u32
}

/// Calls of this processor's own architecture.
const NATIVE: &[Rule] = &[
    (nr(libc::SYS_openat), Kind::DirectAt, &[&[Has(2, DIRECT)]]),
    #[cfg(target_arch = "x86_64")]
    (nr(libc::SYS_open), Kind::Direct, &[&[Has(1, DIRECT)]]),
    (nr(libc::SYS_fcntl), Kind::DirectSet, &[&[SETFL, Has(2, DIRECT)]]),
    (nr(libc::SYS_sendto), Kind::Pages, &[&[Has(3, MSG_ZEROCOPY)]]),
    (nr(libc::SYS_sendmsg), Kind::Pages, &[&[Has(2, MSG_ZEROCOPY)]]),
    (nr(libc::SYS_sendmmsg), Kind::Pages, &[&[Has(3, MSG_ZEROCOPY)]]),
    (nr(libc::SYS_setsockopt), Kind::Carrier, OPTIONS),
    (nr(libc::SYS_vmsplice), Kind::Pages, ALWAYS),
    (nr(libc::SYS_io_uring_setup), Kind::Ring, ALWAYS),
    (nr(libc::SYS_openat2), Kind::DirectHow, ALWAYS),
    (nr(libc::SYS_open_by_handle_at), Kind::Carrier, &[&[Has(2, DIRECT)]]),
    (nr(libc::SYS_pidfd_getfd), Kind::Carrier, ALWAYS),
];

/// Calls that a 64-bit program makes through the 32-bit entry (`int 0x80`); numbers of i386.
#[cfg(target_arch = "x86_64")]
const COMPAT: &[Rule] = &[
    (295, Kind::DirectAt, &[&[Has(2, DIRECT)]]),
    (5, Kind::Direct, &[&[Has(1, DIRECT)]]),
    (55, Kind::DirectSet, &[&[SETFL, Has(2, DIRECT)]]),
    (221, Kind::DirectSet, &[&[SETFL, Has(2, DIRECT)]]),
    // socketcall: sendto, setsockopt, sendmsg, sendmmsg; their arguments are in memory.
    (102, Kind::Carrier, &[&[Is(0, 11)], &[Is(0, 14)], &[Is(0, 16)], &[Is(0, 20)]]),
    (369, Kind::Pages, &[&[Has(3, MSG_ZEROCOPY)]]),
    (370, Kind::Pages, &[&[Has(2, MSG_ZEROCOPY)]]),
    (345, Kind::Pages, &[&[Has(3, MSG_ZEROCOPY)]]),
    (366, Kind::Carrier, OPTIONS),
    (316, Kind::Pages, ALWAYS),
    (425, Kind::Ring, ALWAYS),
    (437, Kind::DirectHow, ALWAYS),
    (342, Kind::Carrier, &[&[Has(2, DIRECT)]]),
    (438, Kind::Carrier, ALWAYS),
];

/// `AUDIT_ARCH_*` of `linux/audit.h`, with its calls. A 64-bit program on aarch64 has no 32-bit entry.
#[cfg(target_arch = "x86_64")]
const ARCHES: &[(u32, &[Rule])] = &[(0xC000_003E, NATIVE), (0x4000_0003, COMPAT)];
#[cfg(target_arch = "aarch64")]
const ARCHES: &[(u32, &[Rule])] = &[(0xC000_00B7, NATIVE)];

/// Numbers of the x32 entry have this bit; the same calls have other numbers there, so all are asked about.
const X32: u32 = 0x4000_0000;

/// What the call that the filter stopped may leave behind.
pub fn kind(arch: u32, nr: u32) -> Kind {
    let rules = ARCHES.iter().find(|(a, _)| *a == arch).map_or(&[][..], |(_, rules)| rules);
    rules.iter().find(|rule| rule.0 == nr).map_or(Kind::Carrier, |rule| rule.1)
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const IF_BITS: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// Offsets in `struct seccomp_data`; both architectures are little-endian.
const AT_NR: u32 = 0;
const AT_ARCH: u32 = 4;
const AT_ARGS: u32 = 16;

fn op(code: u16, k: u32) -> libc::sock_filter {
    branch(code, k, 0, 0)
}

fn branch(code: u16, k: u32, jt: usize, jf: usize) -> libc::sock_filter {
    // Far below 256: a rule has at most 20 instructions, an architecture less than 100.
    debug_assert!(jt < 256 && jf < 256);
    libc::sock_filter { code, jt: jt as u8, jf: jf as u8, k }
}

/// The filter's program.
pub fn program() -> Vec<libc::sock_filter> {
    let mut out = vec![op(LOAD, AT_ARCH)];
    for (arch, rules) in ARCHES {
        let section = section(*arch, rules);
        out.push(branch(IF_EQUAL, *arch, 0, section.len()));
        out.extend(section);
    }
    out.push(op(RETURN, libc::SECCOMP_RET_ALLOW));
    out
}

fn section(arch: u32, rules: &[Rule]) -> Vec<libc::sock_filter> {
    let mut out = vec![op(LOAD, AT_NR)];
    if arch == 0xC000_003E {
        out.push(branch(IF_AT_LEAST, X32, 0, 1));
        out.push(op(RETURN, libc::SECCOMP_RET_USER_NOTIF));
    }
    for (nr, _, alternatives) in rules {
        let mut body = Vec::new();
        for conds in *alternatives {
            for (i, cond) in conds.iter().enumerate() {
                let (code, arg, value) = match *cond {
                    Is(arg, value) => (IF_EQUAL, arg, value),
                    Has(arg, bits) => (IF_BITS, arg, bits),
                };
                body.push(op(LOAD, AT_ARGS + 8 * u32::from(arg)));
                // On to the next alternative: past the other conditions and the return.
                body.push(branch(code, value, 0, 2 * (conds.len() - 1 - i) + 1));
            }
            body.push(op(RETURN, libc::SECCOMP_RET_USER_NOTIF));
        }
        body.push(op(RETURN, libc::SECCOMP_RET_ALLOW));
        out.push(branch(IF_EQUAL, *nr, 0, body.len()));
        out.extend(body);
    }
    out.push(op(RETURN, libc::SECCOMP_RET_ALLOW));
    out
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    const X86_64: u32 = 0xC000_003E;
    const I386: u32 = 0x4000_0003;

    /// What the kernel would do with the program.
    fn asks(arch: u32, nr: u32, args: [u64; 6]) -> bool {
        let mut data = [0u32; 16];
        (data[0], data[1]) = (nr, arch);
        for (i, a) in args.iter().enumerate() {
            (data[4 + 2 * i], data[5 + 2 * i]) = (*a as u32, (*a >> 32) as u32);
        }
        let (mut at, mut acc) = (0, 0);
        let program = program();
        loop {
            let i = &program[at];
            let taken = match i.code {
                LOAD => {
                    acc = data[i.k as usize / 4];
                    at += 1;
                    continue;
                }
                RETURN => return i.k == libc::SECCOMP_RET_USER_NOTIF,
                IF_EQUAL => acc == i.k,
                IF_AT_LEAST => acc >= i.k,
                IF_BITS => acc & i.k != 0,
                other => panic!("instruction {other:#x}"),
            };
            at += 1 + usize::from(if taken { i.jt } else { i.jf });
        }
    }

    #[test]
    fn only_what_may_leave_references_is_asked_about() {
        let native = |nr: libc::c_long, args| asks(X86_64, nr as u32, args);
        let direct = libc::O_DIRECT as u64;
        assert!(native(libc::SYS_vmsplice, [0; 6]));
        assert!(native(libc::SYS_io_uring_setup, [0; 6]));
        assert!(native(libc::SYS_openat2, [0; 6]));
        assert!(native(libc::SYS_pidfd_getfd, [0; 6]));
        for (nr, arg, bits) in [
            (libc::SYS_openat, 2, direct),
            (libc::SYS_open, 1, direct),
            (libc::SYS_sendto, 3, 0x400_0000),
            (libc::SYS_sendmsg, 2, 0x400_0000),
            (libc::SYS_sendmmsg, 3, 0x400_0000),
            (libc::SYS_open_by_handle_at, 2, direct),
        ] {
            let mut args = [0; 6];
            args[arg] = bits | 2 | 1 << 40;
            assert!(native(nr, args), "{nr}");
            args[arg] = !bits;
            assert!(!native(nr, args), "{nr}");
            let mut args = [bits; 6];
            args[arg] = 0;
            assert!(!native(nr, args), "{nr}");
        }
        assert!(native(libc::SYS_fcntl, [3, libc::F_SETFL as u64, direct, 0, 0, 0]));
        assert!(!native(libc::SYS_fcntl, [3, libc::F_SETFL as u64, 0x800, 0, 0, 0]));
        assert!(!native(libc::SYS_fcntl, [3, libc::F_SETFD as u64, direct, 0, 0, 0]));
        assert!(native(libc::SYS_setsockopt, [3, 1, 60, 0, 0, 0]));
        assert!(native(libc::SYS_setsockopt, [3, 6, 31, 0, 0, 0]));
        assert!(!native(libc::SYS_setsockopt, [3, 1, 31, 0, 0, 0]));
        assert!(!native(libc::SYS_setsockopt, [3, 6, 60, 0, 0, 0]));
        for nr in [libc::SYS_read, libc::SYS_mmap, libc::SYS_getppid, libc::SYS_execve, libc::SYS_close] {
            assert!(!native(nr, [u64::MAX; 6]), "{nr}");
        }
    }

    #[test]
    fn the_other_entries_are_no_way_around() {
        assert!(asks(X86_64, X32 | 532, [0; 6]));
        assert!(asks(I386, 316, [0; 6]));
        assert!(asks(I386, 102, [16, 0, 0, 0, 0, 0]));
        assert!(!asks(I386, 102, [3, 0, 0, 0, 0, 0]));
        assert!(!asks(I386, libc::SYS_vmsplice as u32, [0; 6]));
        assert!(!asks(1, 278, [0; 6]));
    }

    #[test]
    fn what_is_stopped_has_its_kind() {
        assert_eq!(kind(X86_64, libc::SYS_vmsplice as u32), Kind::Pages);
        assert_eq!(kind(X86_64, libc::SYS_openat as u32), Kind::DirectAt);
        assert_eq!(kind(I386, 5), Kind::Direct);
        assert_eq!(kind(X86_64, X32 | 532), Kind::Carrier);
    }
}
