use super::tmp::in_memory;
use super::*;

const M: u64 = 1 << 20;
const G: u64 = 1 << 30;
const RAM: Spec = Spec::Ram { size: None };

fn limited(left: u64) -> Memory {
    let limit = cgroup::Limit { group: "/g".into(), limit: left, left };
    Memory { total: 64 * G, available: 32 * G, limit: Some(limit) }
}

fn ram(size: u64) -> Spec {
    Spec::Ram { size: Some(size) }
}

#[test]
fn auto_divides_a_limit_into_half_a_third_and_a_sixth() {
    let plan = plan(Dram::Auto, &[RAM], &limited(1200 * M)).unwrap();
    assert_eq!(plan, Plan { dram: 600 * M, devices: vec![ram(400 * M)] });
}

#[test]
fn without_a_limit_a_share_of_the_free_memory_is_divided() {
    let free = Memory { total: 64 * G, available: 16 * G, limit: None };
    // 12 GiB to plan with, 2 GiB reserve at most.
    let plan = plan(Dram::Auto, &[RAM], &free).unwrap();
    assert_eq!(plan, Plan { dram: 6 * G, devices: vec![ram(4 * G)] });
    let loose = Memory { limit: limited(40 * G).limit, ..free };
    assert_eq!(loose.left(), 12 * G);
}

#[test]
fn whatever_is_asked_for_auto_never_plans_more_than_is_left() {
    let left = 1200 * M;
    for devices in [vec![RAM], vec![RAM, RAM], vec![ram(100 * M)], vec![ram(100 * M), RAM], vec![]] {
        let plan = plan(Dram::Auto, &devices, &limited(left)).unwrap();
        let pools: u64 = plan.devices.iter().filter_map(Spec::size).sum();
        assert!(plan.dram + pools <= left - left / 6, "{plan:?}");
        assert!(plan.dram >= MIN_DRAM && plan.devices.len() == devices.len());
    }
}

#[test]
fn a_fixed_dram_leaves_the_rest_to_the_pool() {
    let plan1 = plan(Dram::Bytes(128 * M), &[ram(100 * M), RAM], &limited(1200 * M)).unwrap();
    assert_eq!(plan1, Plan { dram: 128 * M, devices: vec![ram(100 * M), ram(772 * M)] });
    // More than is left: the pool gets its minimum, the user has decided.
    let plan2 = plan(Dram::Bytes(2 * G), &[RAM], &limited(1200 * M)).unwrap();
    assert_eq!(plan2, Plan { dram: 2 * G, devices: vec![ram(MIN_POOL)] });
}

#[test]
fn sizes_that_cannot_work_are_refused() {
    let memory = limited(1200 * M);
    assert!(matches!(plan(Dram::Bytes(0), &[RAM], &memory), Err(BudgetError::DramTooSmall(0))));
    assert!(matches!(plan(Dram::Bytes(MIN_DRAM - 1), &[RAM], &memory), Err(BudgetError::DramTooSmall(_))));
    assert!(plan(Dram::Bytes(MIN_DRAM), &[RAM], &memory).is_ok());
    assert!(matches!(plan(Dram::Bytes(65 * G), &[RAM], &memory), Err(BudgetError::DramTooLarge { .. })));
    assert!(matches!(plan(Dram::Auto, &[ram(u64::MAX)], &memory), Err(BudgetError::PoolTooLarge { .. })));
    assert!(matches!(plan(Dram::Auto, &[ram(2 * G)], &memory), Err(BudgetError::NothingLeft(_))));
    assert!(matches!(plan(Dram::Auto, &[RAM], &limited(20 * M)), Err(BudgetError::NothingLeft(_))));
    assert!(matches!(plan(Dram::Auto, &[RAM], &limited(0)), Err(BudgetError::NothingLeft(0))));
}

#[test]
fn memory_of_its_own_counts_if_it_is_the_machines() {
    let spec = |text: &str| text.parse::<Spec>().unwrap();
    let devices = |text: &str, dram| plan(dram, &[spec(text), RAM], &limited(1200 * M)).map(|p| p.devices);
    let auto = plan(Dram::Auto, &[spec("generic:memfd:100M")], &limited(1200 * M)).unwrap();
    assert_eq!((auto.dram, &auto.devices[..]), (900 * M, &[spec("generic:memfd:100M")][..]));
    for ours in ["coherent:memfd:100M", "numa:0:100M", "inject:full=1:generic:memfd:100M"] {
        assert_eq!(devices(ours, Dram::Bytes(128 * M)).unwrap(), [spec(ours), ram(772 * M)]);
    }
    // Huge pages are reserved already; a node or a file is not memory, or is not known to be. What has a size keeps it.
    for other in ["generic:hugetlb:100M", "generic:/dev/dax0.0", "generic:/mnt/pmem:8T"] {
        assert_eq!(devices(other, Dram::Bytes(128 * M)).unwrap(), [spec(other), ram(872 * M)]);
    }
    let large = devices("generic:memfd:65G", Dram::Bytes(128 * M));
    assert!(matches!(large, Err(BudgetError::PoolTooLarge { .. })));
}

#[test]
fn a_file_device_needs_a_directory_and_is_sized_from_its_file_system() {
    let memory = limited(1200 * M);
    let tmp = tempfile::tempdir().unwrap();
    let file = |dir: &Path, size| Spec::File { dir: dir.into(), size };
    let plan1 = plan(Dram::Auto, &[file(tmp.path(), None)], &memory).unwrap();
    let size = plan1.devices[0].size().unwrap();
    assert!(size >= M && size <= 8 * memory.total, "{size}");
    assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 0);

    let plan2 = plan(Dram::Auto, &[file(tmp.path(), Some(5 * M))], &memory).unwrap();
    assert_eq!(plan2.devices, [file(tmp.path(), Some(5 * M))]);

    let named = tmp.path().join("file");
    std::fs::write(&named, "").unwrap();
    for bad in [named, tmp.path().join("missing")] {
        assert!(matches!(plan(Dram::Auto, &[file(&bad, None)], &memory), Err(BudgetError::Directory { .. })));
    }
}

#[test]
fn a_device_with_injected_faults_counts_as_what_it_is() {
    let faulty: Spec = "inject:fail-store=5:ram".parse().unwrap();
    let plan = plan(Dram::Auto, std::slice::from_ref(&faulty), &limited(1200 * M)).unwrap();
    assert_eq!(plan, Plan { dram: 600 * M, devices: vec![faulty.with_size(400 * M)] });
}

#[test]
fn meminfo_is_read_in_bytes() {
    let tmp = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(tmp.path().join("proc")).unwrap();
    assert!(matches!(memory(tmp.path()), Err(BudgetError::NoProc { .. })));
    let text = "MemTotal:       2048 kB\nMemFree:  1 kB\nMemAvailable:    1024 kB\n";
    std::fs::write(tmp.path().join("proc/meminfo"), text).unwrap();
    assert_eq!(memory(tmp.path()).unwrap(), Memory { total: 2 * M, available: M, limit: None });
}

#[test]
fn the_temporary_directory_is_one_on_a_disk() {
    let tmp = tempfile::tempdir().unwrap();
    let missing = tmp.path().join("missing");
    let shm = PathBuf::from("/dev/shm");
    if in_memory(tmp.path()).unwrap() || !in_memory(&shm).unwrap_or(false) {
        crate::skipped!("needs a temporary directory on a disk and a tmpfs at /dev/shm");
        return;
    }
    let (dir, refused) = temp_dir([missing.clone(), shm.clone(), tmp.path().into()]);
    assert_eq!(dir.as_deref(), Some(tmp.path()));
    assert_eq!(refused.iter().map(|r| &r.dir).collect::<Vec<_>>(), [&missing, &shm]);
    assert_eq!(temp_dir([shm]).0, None);
    assert_eq!(default_devices(None), [RAM]);
}
