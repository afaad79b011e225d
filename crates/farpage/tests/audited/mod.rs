//! The audit at the end of a test.

use std::time::Duration;

use farpage::domain::Domain;

/// An audit of the domain finds no difference, and nothing that it could not judge: every frame's count is the number of
/// references that are there, and every process is charged for what it has. To be called when the test is done with moving pages.
pub fn assert_audit(domain: &Domain) {
    let mut audit = domain.audit().unwrap();
    // What cannot be judged now (a busy machine) is judged later; a difference stays one.
    for _ in 0..50 {
        if !audit.is_right() || (audit.moving == 0 && audit.silent.is_empty()) {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
        audit = domain.audit().unwrap();
    }
    assert!(audit.is_right(), "{audit:?}");
    assert_eq!((audit.moving, &audit.silent[..]), (0, &[][..]), "not everything could be judged: {audit:?}");
}
