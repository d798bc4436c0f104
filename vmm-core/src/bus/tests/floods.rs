#![forbid(unsafe_code)]
//! What a guest says without end makes few lines.

use super::*;

#[test]
fn a_flood_of_nonsense_makes_few_lines_and_no_answers() {
    let mut world = World::booted();
    world.heard();
    let lines = world.log_lines;
    for number in 0..100_000u32 {
        world.post_bytes(&[99, 0, 0, 0, 0, 0, 0, 0]);
        world.post_bytes(&number.to_le_bytes()[..3]);
        world.guest(GuestToHost::CloseChannel {
            channel: ChannelId(number | 0x8000),
        });
    }
    assert_eq!(world.heard(), []);
    assert!(world.log_lines - lines < 60, "{} lines", world.log_lines - lines);
}

#[test]
fn a_guest_that_comes_and_goes_without_end_makes_few_lines() {
    let mut world = World::new();
    for _ in 0..10_000 {
        world.contact(Version::V5_3, 0);
        world.guest(GuestToHost::Unload);
    }
    assert!((1..40).contains(&world.log_lines), "{} lines", world.log_lines);
}
