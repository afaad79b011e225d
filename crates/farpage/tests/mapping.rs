//! Memory that the CPU reaches in place: every mapping holds what it maps, and the last one gives it back.
#![cfg(not(loom))]

mod common;

use common::{ME, area, memory, registered};
use farpage::PAGE_SIZE;
use farpage::device::memory::{HUGE, MemoryError, MemorySpec};
use farpage::device::{LoadOp, StoreOp, Sum};
use farpage::frame::ledger::HolderKind;
use farpage::frame::{GetError, Pfn};
use farpage::pagemap::{DriverId, HoldError, MapError, MemoryType, Pagemap, Registration};
use farpage::sys::numa;
use rustix::io::Errno;

fn register(spec: &str) -> Pagemap {
    let parsed: MemorySpec = spec.parse().unwrap();
    let ops = Box::new(memory(spec));
    let frames = ops.frames();
    let what = Registration {
        id: 0,
        memory_type: parsed.memory_type,
        driver: DriverId(1),
        ranges: vec![0..frames; 1],
        ops,
    };
    Pagemap::register(what, area(frames), true).unwrap()
}

fn in_use(map: &Pagemap) -> u64 {
    map.device.ops().memory().unwrap().in_use().unwrap()
}

#[test]
fn a_mapped_page_has_a_reference_and_the_last_unmap_frees_it() {
    for spec in ["generic:memfd:8M", "coherent:memfd:8M"] {
        let map = register(spec);
        let first = map.map_new(ME, 3 * PAGE_SIZE, PAGE_SIZE).unwrap();
        let pfn = first.hold().pfn();
        assert_eq!((pfn..pfn + 3).map(|p| map.frames.count(p)).collect::<Vec<_>>(), [1, 1, 1]);
        let second = map.map(ME, pfn + 1, 2 * PAGE_SIZE).unwrap();
        let third = map.map(2, pfn + 2, PAGE_SIZE).unwrap();
        assert_eq!((pfn..pfn + 3).map(|p| map.frames.count(p)).collect::<Vec<_>>(), [1, 2, 3]);

        // The same memory.
        assert!(first.write(PAGE_SIZE, b"hello") && third.write(0, b"third"));
        let mut bytes = [0; 5];
        assert!(second.read(0, &mut bytes));
        assert_eq!(&bytes, b"hello");
        assert!(first.read(2 * PAGE_SIZE, &mut bytes));
        assert_eq!(&bytes, b"third");

        let before = in_use(&map);
        assert_eq!(before, 3 * PAGE_SIZE as u64);
        drop(first);
        assert_eq!((pfn..pfn + 3).map(|p| map.frames.count(p)).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(in_use(&map), 2 * PAGE_SIZE as u64, "{spec}: its memory is free at once");
        drop(third);
        drop(second);
        assert_eq!((map.frames.used(), in_use(&map), map.ledger.iter().count()), (0, 0, 0));

        // Who gets the frame next finds zeros.
        let next = map.map_new(ME, 3 * PAGE_SIZE, PAGE_SIZE).unwrap();
        assert_eq!(next.hold().pfn(), pfn);
        let mut all = vec![9; 3 * PAGE_SIZE];
        assert!(next.read(0, &mut all));
        assert!(all.iter().all(|b| *b == 0));
    }
}

#[test]
fn what_cannot_be_mapped() {
    let map = register("generic:memfd:1M");
    let bad =
        |r: Result<_, MapError>| -> MapError { r.map(|_: farpage::pagemap::Mapping<'_>| ()).unwrap_err() };
    assert_eq!(bad(map.map_new(ME, 0, PAGE_SIZE)), MapError::Length(0, 4096));
    assert_eq!(bad(map.map_new(ME, 5000, PAGE_SIZE)), MapError::Length(5000, 4096));
    assert_eq!(bad(map.map_new(ME, 2 << 20, PAGE_SIZE)), HoldError::Full(512).into());
    assert_eq!(bad(map.map_new(ME, PAGE_SIZE << 40, PAGE_SIZE)), MapError::Length(PAGE_SIZE << 40, 4096));
    assert_eq!(bad(map.map(ME, 7, PAGE_SIZE)), HoldError::Frame(7, GetError::Free).into());
    assert_eq!(bad(map.map(ME, 255, 2 * PAGE_SIZE)), HoldError::NoFrame(255, 257).into());
    assert_eq!(bad(map.map(ME, u32::MAX, PAGE_SIZE)), HoldError::NoFrame(u32::MAX, 1 << 32).into());
    // Half of it is there: the other half is as before.
    let some = map.map_new(ME, PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_eq!(
        bad(map.map(ME, some.hold().pfn(), 2 * PAGE_SIZE)),
        HoldError::Frame(1, GetError::Free).into()
    );
    assert_eq!((map.frames.count(0), map.ledger.iter().count()), (1, 1));
    assert!(!some.read(PAGE_SIZE, &mut [0]) && !some.write(usize::MAX, &[0]));
    let private = registered(MemoryType::Private);
    assert_eq!(bad(private.map_new(ME, PAGE_SIZE, PAGE_SIZE)), MapError::Unreachable(MemoryType::Private));
    assert!(matches!(private.alloc_held(ME, HolderKind::CleanCopy, 1, 1), Err(HoldError::Kind(_))));
    assert!(matches!(private.alloc_held(ME, HolderKind::Pin, 0, 1), Err(HoldError::NoFrame(0, 0))));
    assert_eq!(private.frames.used(), 0);
    assert!(matches!(private.hold(ME, HolderKind::Entry, 0, 1), Err(HoldError::Kind(HolderKind::Entry))));
}

#[test]
fn peer_memory_is_in_use_from_its_allocation_and_mapped_on_request() {
    let map = register("p2pdma:memfd:1M");
    let driver = map.alloc_held(ME, HolderKind::Driver, 4, 1).unwrap();
    let pfn = driver.pfn();
    assert_eq!(map.frames.count(pfn), 1, "the driver's allocation is a reference");
    assert_eq!(map.map(2, pfn, PAGE_SIZE).err(), Some(MapError::OnRequest));
    assert_eq!(map.map_new(2, PAGE_SIZE, PAGE_SIZE).err(), Some(MapError::OnRequest));
    let mapped = map.map_p2p(2, pfn, 4 * PAGE_SIZE).unwrap();
    assert!(mapped.write(0, b"peer"));
    // The driver lets go first: the mapping keeps the memory.
    drop(driver);
    let mut bytes = [0; 4];
    assert!(mapped.read(0, &mut bytes));
    assert_eq!((&bytes, map.frames.count(pfn)), (b"peer", 1));
    drop(mapped);
    assert_eq!(map.frames.used(), 0);
}

#[test]
fn runs_of_2_mib() {
    let map = register("generic:memfd:16M");
    let small = map.map_new(ME, PAGE_SIZE, PAGE_SIZE).unwrap();
    let huge: Vec<_> = std::iter::from_fn(|| map.map_new(ME, HUGE as usize, HUGE as usize).ok()).collect();
    let pfns: Vec<Pfn> = huge.iter().map(|m| m.hold().pfn()).collect();
    assert_eq!(pfns, (1..8).map(|n| n * 512).collect::<Vec<_>>(), "all but the one that has a small page");
    let more: Vec<_> = (0..511).map(|_| map.map_new(ME, PAGE_SIZE, PAGE_SIZE).unwrap()).collect();
    assert_eq!(map.map_new(ME, PAGE_SIZE, PAGE_SIZE).err(), Some(HoldError::Full(1).into()));
    drop((small, more));
    // One whose middle is held stays away from the next.
    let middle = map.map(ME, 1024 + 100, PAGE_SIZE).unwrap();
    drop(huge);
    let again: Vec<Pfn> = (0..7)
        .map(|_| map.alloc_held(ME, HolderKind::Driver, 512, 512).unwrap())
        .map(|hold| {
            let pfn = hold.pfn();
            std::mem::forget(hold);
            pfn
        })
        .collect();
    assert_eq!(again, [0, 512, 1536, 2048, 2560, 3072, 3584]);
    drop(middle);
    assert_eq!(map.frames.used(), 7 * 512);
}

#[test]
fn many_records_for_a_long_mapping() {
    let map = register("generic:memfd:300M");
    let pages = 70_000u32; // more than two records hold
    let hold = map.alloc_held(ME, HolderKind::Driver, pages, 1).unwrap();
    assert_eq!(map.ledger.iter().count(), 3);
    let again = map.hold(2, HolderKind::Pin, hold.pfn() + 5, pages - 5).unwrap();
    assert_eq!(map.ledger.iter().count(), 6);
    assert_eq!(map.frames.count(hold.pfn() + pages - 1), 2);
    drop(hold);
    assert_eq!(map.frames.used() as u32, pages - 5);
    drop(again);
    assert_eq!((map.frames.used(), map.ledger.iter().count()), (0, 0));
}

#[test]
fn pages_move_in_and_out_of_coherent_memory() {
    let map = register("coherent:memfd:1M");
    let pfn = map.try_alloc(ME).unwrap();
    let page = farpage::Page([5; PAGE_SIZE]);
    let sum = Sum::of(&page);
    let mut ops = [StoreOp { pfn, page: &page, sum, result: Ok(()) }];
    map.device.store(&mut ops, ME);
    assert_eq!(ops[0].result, Ok(()));
    map.frames.settle(pfn);
    // The CPU reaches it in place, and what it writes there counts.
    let mapped = map.map(ME, pfn, PAGE_SIZE).unwrap();
    let mut byte = [0];
    assert!(mapped.read(77, &mut byte) && byte == [5] && mapped.write(77, &[6]));
    let mut out = farpage::Page([0; PAGE_SIZE]);
    let mut ops = [LoadOp { pfn, page: &mut out, result: Ok(Sum::default()) }];
    assert_eq!(map.load(&mut ops).2, Ok(()));
    assert_eq!((out.0[76], out.0[77]), (5, 6));
    assert_ne!(map.device.sum(pfn), sum);
}

#[test]
fn a_child_does_not_inherit_a_mapping() {
    let map = register("generic:memfd:1M");
    let mapped = map.map_new(ME, PAGE_SIZE, PAGE_SIZE).unwrap();
    assert!(mapped.write(0, &[1]));
    // SAFETY: the child only uses the mapping and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let read = mapped.read(0, &mut [0]);
        let pfn = mapped.hold().pfn();
        // SAFETY: asks whether the page is mapped.
        let there = unsafe { libc::msync(mapped.as_ptr().cast(), PAGE_SIZE, libc::MS_ASYNC) } == 0;
        drop(mapped);
        let fine = !read && !there && map.frames.count(pfn) == 1;
        // SAFETY: ends the child without the test harness.
        unsafe { libc::_exit(i32::from(!fine)) };
    }
    assert_eq!(exit_status(child), 0);
    let mut byte = [0];
    assert!(mapped.read(0, &mut byte) && byte == [1]);
    drop(mapped);
    assert_eq!(map.frames.used(), 0);
}

fn exit_status(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: our child, waited for once.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    status
}

#[test]
fn what_a_killed_process_held_is_given_back() {
    let map = register("generic:memfd:4M");
    let mine = map.map_new(ME, 40 * PAGE_SIZE, PAGE_SIZE).unwrap();
    let dead = 2;
    for round in 0..60 {
        // SAFETY: the child works on the pagemap alone, in one thread, until it is killed.
        let child = unsafe { libc::fork() };
        if child == 0 {
            loop {
                let shared = map.map(dead, mine.hold().pfn() + 3, 20 * PAGE_SIZE);
                let fresh = map.map_new(dead, 30 * PAGE_SIZE, 4 * PAGE_SIZE);
                let twice = map.hold(dead, HolderKind::Pin, mine.hold().pfn(), 10);
                drop((shared, twice, fresh));
            }
        }
        std::thread::sleep(std::time::Duration::from_micros(500 + round * 37));
        // SAFETY: our child.
        unsafe { libc::kill(child, libc::SIGKILL) };
        assert_eq!(exit_status(child), libc::SIGKILL);
        map.reap(dead, ME);
        let counts: Vec<u32> = (0..40).map(|i| map.frames.count(mine.hold().pfn() + i)).collect();
        assert_eq!(counts, [1; 40], "round {round}");
        assert_eq!((map.frames.used(), map.ledger.iter().count()), (40, 1), "round {round}");
    }
    drop(mine);
    assert_eq!((map.frames.used(), in_use(&map)), (0, 0));
    map.unregister(&mut (), ME, std::time::Duration::ZERO).unwrap();
}

#[test]
fn files_and_directories() {
    let dir = tempfile::tempdir().unwrap();
    let map = register(&format!("generic:{}:1M", dir.path().display()));
    let mapped = map.map_new(ME, PAGE_SIZE, PAGE_SIZE).unwrap();
    assert!(mapped.write(0, b"in a file"));
    drop(mapped);

    let file = dir.path().join("memory");
    let spec = format!("generic:{}", file.display());
    let create = |spec: &str| spec.parse::<MemorySpec>().unwrap().create();
    assert!(create(&spec).is_err() && !file.exists(), "without a size no file is made");
    std::fs::write(&file, "").unwrap();
    assert_eq!(create(&spec).err(), Some(MemoryError::NoSize(spec.clone())));
    let sized = create(&format!("{spec}:1M")).unwrap();
    assert_eq!((sized.frames(), sized.frame_size()), (256, 4096));
    assert_eq!(create(&spec).unwrap().frames(), 256, "it has a size now");
    std::fs::write(&file, "somebody's work").unwrap();
    assert_eq!(create(&spec).err(), Some(MemoryError::HasData(spec)));
    for (spec, errno) in
        [("generic:/dev/null:1M", Errno::NODEV), ("generic:/nowhere/at/all:1M", Errno::NOENT)]
    {
        let error = create(spec).err().unwrap();
        assert!(matches!(&error, MemoryError::Sys { errno: e, .. } if *e == errno), "{error}");
    }
    let odd = create("generic:memfd:5000").err().unwrap();
    assert!(matches!(odd, MemoryError::Size { size: 5000, frame_size: 4096, .. }), "{odd}");
}

#[test]
fn huge_pages() {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let free = || -> u64 {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find(|l| l.starts_with("HugePages_Free:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let before = std::fs::read_to_string(POOL).unwrap_or_default();
    if free() < 4 {
        // Errors mean that we may not; then there are none.
        let _tried = std::fs::write(POOL, (before.trim().parse::<u64>().unwrap_or(0) + 4).to_string());
    }
    let had = free();
    if had < 4 {
        println!("skipped: no huge pages can be reserved here");
        let _restored = std::fs::write(POOL, before.trim());
        return;
    }
    {
        let map = register("generic:hugetlb:8M");
        assert_eq!(map.device.ops().memory().unwrap().frame_size(), HUGE);
        assert_eq!(map.map_new(ME, PAGE_SIZE, PAGE_SIZE).err(), Some(MapError::Length(PAGE_SIZE, HUGE)));
        let two = map.map_new(ME, 2 * HUGE as usize, HUGE as usize).unwrap();
        assert!((two.as_ptr() as usize).is_multiple_of(HUGE as usize) && two.write(HUGE as usize, b"huge"));
        assert_eq!(free(), had - 2, "two huge pages, two references");
        assert_eq!((map.frames.count(0), map.frames.count(1), map.frames.used()), (1, 1, 2));
        let one = map.map(2, 1, HUGE as usize).unwrap();
        drop(two);
        assert_eq!((map.frames.used(), free()), (1, had - 1));
        let mut bytes = [0; 4];
        assert!(one.read(0, &mut bytes));
        assert_eq!(&bytes, b"huge");
        drop(one);
        assert_eq!((map.frames.used(), free()), (0, had), "the last unmap gives the huge page back");
        // More than the machine has is an error, not a SIGBUS.
        let _all = map.map_new(ME, 4 * HUGE as usize, HUGE as usize);
        map.unregister(&mut (), ME, std::time::Duration::ZERO).unwrap_err();
    }
    assert_eq!(free(), had);
    std::fs::write(POOL, before.trim()).unwrap();
}

#[test]
fn memory_of_a_node() {
    let nodes = numa::memory_nodes();
    let Some(node) = nodes.last() else {
        println!("skipped: this machine does not say which memory nodes it has");
        return;
    };
    let map = register(&format!("numa:{node}:1M"));
    assert_eq!(map.memory_type, MemoryType::Coherent);
    let mapped = map.map_new(ME, 16 * PAGE_SIZE, PAGE_SIZE).unwrap();
    for i in 0..16 {
        assert_eq!(numa::node_of(mapped.as_ptr() as usize + i * PAGE_SIZE), Ok(*node));
    }
    let missing = "numa:999:1M".parse::<MemorySpec>().unwrap().create().err().unwrap();
    assert_eq!(missing, MemoryError::NoNode { name: "numa:999:1M".into(), nodes });
}

#[test]
fn specifications() {
    for text in [
        "generic:memfd:1M",
        "generic:hugetlb:4M",
        "generic:/dev/dax0.0",
        "generic:/mnt/a:b:2M",
        "coherent:memfd:1G",
        "numa:1",
        "numa:1:64M",
        "p2pdma:memfd:1M",
    ] {
        let spec: MemorySpec = text.parse().unwrap();
        assert_eq!(spec.to_string(), text);
    }
    for (text, message) in [
        ("", "unknown memory ``"),
        ("memfd", "unknown memory `memfd`"),
        ("generic:", "unknown memory"),
        ("private:memfd:1M", "unknown memory"),
        ("numa:", "names no node"),
        ("numa:x:1M", "names no node"),
        ("generic:memfd:99999999T", "too large"),
    ] {
        let error = text.parse::<MemorySpec>().unwrap_err().to_string();
        assert!(error.contains(message), "{text}: {error}");
    }
}
