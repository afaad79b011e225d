//! A device of memory, with a file in its place: device-dax nodes are tried in a virtual machine (docs/dax-vm.md).

use std::time::Duration;

use farpage::Pin;
use farpage::dax::{DaxDevice, DaxError, Wait};

const PAGE: u64 = 4096;

fn device(pages: u64) -> (tempfile::TempDir, DaxDevice) {
    let dir = tempfile::tempdir().unwrap();
    let device = DaxDevice::open_file(dir.path().join("device"), pages * PAGE, dir.path()).unwrap();
    (dir, device)
}

fn fill(mapping: &farpage::dax::DeviceMapping, byte: u8) {
    // SAFETY: all of the mapping, which nobody else uses.
    unsafe { std::ptr::write_bytes(mapping.as_ptr(), byte, mapping.len()) };
}

fn first(mapping: &farpage::dax::DeviceMapping) -> u8 {
    // SAFETY: inside the mapping.
    unsafe { mapping.as_ptr().read_volatile() }
}

#[test]
fn runs_are_had_until_the_last_unmap() {
    let (_dir, device) = device(64);
    assert_eq!((device.size(), device.align(), device.target_node()), (64 * PAGE, PAGE, None));
    let one = device.allocate(PAGE, PAGE).unwrap();
    let big = device.allocate(16 * PAGE, 16 * PAGE).unwrap();
    assert_eq!((one.len(), big.len(), big.range()), (4096, 16 * 4096, 16 * PAGE..32 * PAGE));
    fill(&big, 7);
    assert_eq!(device.in_use(), 17 * PAGE);

    // A second mapping, in this process or another, and a pin: the run stays theirs.
    let again = device.map(big.range()).unwrap();
    drop(big);
    assert_eq!((first(&again), device.in_use()), (7, 17 * PAGE));
    let pin = device.pin(20 * PAGE..21 * PAGE, Pin::LongTerm).unwrap();
    drop(again);
    assert_eq!(device.in_use(), 2 * PAGE);
    assert!(device.users()[0].to_string().contains("long-term pin of 0x14000..0x15000"));
    let error = device.wait_idle(&Wait { timeout: Duration::from_millis(30), stop: None }).unwrap_err();
    assert!(error.to_string().contains("long-term pin"), "{error}");
    assert_eq!(pin.range(), 20 * PAGE..21 * PAGE);
    drop((pin, one));
    assert_eq!(device.in_use(), 0);
    assert!(device.audit().is_empty());

    // What is handed out again is zero.
    let all = device.allocate(64 * PAGE, PAGE).unwrap();
    // SAFETY: inside the mapping.
    assert_eq!(unsafe { all.as_ptr().add(20 * 4096).read_volatile() }, 0);
    assert!(matches!(device.allocate(PAGE, PAGE), Err(DaxError::Hold { .. })), "there is no more");
}

#[test]
fn what_lies_at_a_place_stays_there() {
    let (dir, device) = device(8);
    fill(&device.map(2 * PAGE..4 * PAGE).unwrap(), 9);
    drop(device);
    let device = DaxDevice::open_file(dir.path().join("device"), PAGE, dir.path()).unwrap();
    assert_eq!(device.size(), 8 * PAGE);
    assert_eq!(first(&device.map(3 * PAGE..4 * PAGE).unwrap()), 9);
    for wrong in [0..0, 1..PAGE, 0..9 * PAGE, 7 * PAGE..10 * PAGE] {
        assert!(matches!(device.map(wrong), Err(DaxError::Range { .. })));
    }
    let error = device.pin(0..PAGE, Pin::Short).unwrap_err();
    assert!(matches!(error, DaxError::Hold { .. }), "nobody has it: {error}");
}

#[test]
fn a_file_is_no_device_unless_one_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, [0; 4096]).unwrap();
    let error = DaxDevice::open(&path).unwrap_err().to_string();
    assert!(error.contains("device-dax"), "{error}");
    assert!(DaxDevice::open("/dev/dax99.0").unwrap_err().to_string().contains("No such file"));
    assert!(DaxDevice::open("/dev/null").is_err());
}
