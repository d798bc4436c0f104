//! Device servers that are killed and replaced by the dozen while a Linux guest works: it must not notice.

use bulkhead_tests::kill::rig::{Act, Plan, run};
use bulkhead_tests::tier;

#[test]
fn a_guest_at_work_does_not_notice_fifty_deaths_of_each_server_and_twenty_swaps() {
    let (Some(rig), Some(programs)) = (tier::rig(), tier::programs()) else {
        return;
    };
    let plan = Plan {
        acts: vec![
            (Act::Kill, "bulkhead-block", "disk0", 50),
            (Act::Kill, "bulkhead-net", "net0", 50),
            (Act::Swap, "bulkhead-block", "disk0", 10),
            (Act::Swap, "bulkhead-net", "net0", 10),
        ],
        seed: 1,
        echo: false,
    };
    let seen = run(rig, programs, &plan).expect("the guest comes to work");
    assert_eq!(seen.faults, [0; 3], "{}", seen.said);
    assert_eq!(seen.replaced, 120);
}
