//! The conversation, and what a disk says of itself.

use crate::room::*;
use device_block::config::DiskConfig;
use device_block::storvsp::wire::{Operation, VstorPacket};
use device_block::vsc::{Command, Data};
use vmbus::mem::Gpa;
use vmbus::vsc::ChannelOptions;

#[test]
fn linux_finds_its_disk() {
    let file = image(64 << 20);
    let mut room = room(&file);
    let mut primary = room.open(ChannelOptions::default()).unwrap();
    let properties = primary.initialize(room.deadline()).unwrap();
    assert_eq!(properties.max_channel_count.get(), 3);
    assert_eq!(properties.flags.get(), 1);
    assert_eq!(properties.max_transfer_bytes.get(), 1 << 20);
    let page = room.guest.allocate(1).unwrap();

    assert!(run(&room, &mut primary, &Command::inquiry(0, None, page, 36)).is_good(36));
    assert_eq!(get(&room, page, 8)[..3], [0, 0, 6]);
    assert!(run(&room, &mut primary, &Command::inquiry(1, None, page, 36)).is_good(36));
    assert_eq!(get(&room, page, 1), [0x7F], "an absent unit says so in its data");
    let luns = Command::new(
        0,
        &[0xA0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0],
        Data::ToGuest(page, 4096),
    );
    assert!(run(&room, &mut primary, &luns).is_good(16));
    assert_eq!(
        get(&room, page, 16),
        [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    assert!(run(&room, &mut primary, &Command::new(0, &[0; 6], Data::None)).is_good(0));
    assert!(run(&room, &mut primary, &Command::read_capacity(0, page)).is_good(32));
    let capacity = get(&room, page, 16);
    assert_eq!(capacity[..8], ((64u64 << 20) / 512 - 1).to_be_bytes());
    assert_eq!(capacity[8..12], 512u32.to_be_bytes());
    assert_eq!(capacity[14] & 0x80, 0x80, "thin");
    assert!(run(&room, &mut primary, &Command::inquiry(0, Some(0x80), page, 255)).is_good(12));
    assert_eq!(get(&room, page, 12), b"\0\x80\0\x08SERIAL-1");
    assert!(run(&room, &mut primary, &Command::inquiry(0, Some(0xB0), page, 64)).is_good(64));
    let caching = Command::new(0, &[0x1A, 0, 8, 0, 192, 0], Data::ToGuest(page, 192));
    assert!(run(&room, &mut primary, &caching).is_good(24));
    assert_eq!(get(&room, page, 24)[6] & 4, 4, "a write cache");
    assert_eq!(
        run(&room, &mut primary, &Command::new(7, &[0; 6], Data::None)).srb_status,
        0x20
    );
    assert!(run(&room, &mut primary, &Command::new(0, &[0x93; 16], Data::None)).is_check(5, 0x20, 0));
    room.supervisor.ping(7, room.deadline()).unwrap();
}

#[test]
fn sub_channels_are_offered_when_asked_for_and_serve_at_once() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut channels = room.open_all(3).unwrap();
    assert_eq!(channels.len(), 4);
    for initiator in &mut channels {
        assert!(run(&room, initiator, &Command::new(0, &[0; 6], Data::None)).is_good(0));
    }
    let begin = VstorPacket::with_body(Operation::BeginInitialization, &[]);
    let refused = channels[2].call(&begin, room.deadline()).unwrap();
    assert_eq!(
        refused.header.status.get(),
        0xC000_0184,
        "no initialisation on a sub-channel"
    );
}

#[test]
fn nothing_is_executed_before_initialisation() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open(ChannelOptions::default()).unwrap();
    assert_eq!(
        run(&room, &mut primary, &Command::flush(0)).packet_status,
        0xC000_0184
    );
    primary.initialize(room.deadline()).unwrap();
    assert!(run(&room, &mut primary, &Command::flush(0)).is_good(0));
}

#[test]
fn a_reset_is_answered_after_everything_that_was_outstanding() {
    let file = image(16 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(0).unwrap().remove(0);
    let data = room.guest.allocate(256).unwrap();
    for i in 0..16u64 {
        let gpa = Gpa(data.0 + i * 65536);
        primary
            .queue_as(&Command::write_durable(0, i * 65536, gpa, 65536), i + 1)
            .unwrap();
    }
    let reset = VstorPacket::with_body(Operation::ResetBus, &[]);
    primary
        .channel
        .send_in_band(99, true, &[zerocopy::IntoBytes::as_bytes(&reset)])
        .unwrap();
    primary.channel.flush().unwrap();
    let mut order = Vec::new();
    primary
        .collect(17, room.deadline(), |id, reply| {
            order.push((id, reply.packet_status))
        })
        .unwrap();
    assert_eq!(order.last(), Some(&(99, 0)));
}

#[test]
fn a_channel_can_be_closed_and_opened_again_and_starts_anew() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let channels = room.open_all(2).unwrap();
    for initiator in channels.iter().rev() {
        room.guest
            .close_channel(&initiator.channel, room.deadline())
            .unwrap();
    }
    let mut again = room.open(ChannelOptions::default()).unwrap();
    assert_eq!(
        run(&room, &mut again, &Command::flush(0)).packet_status,
        0xC000_0184
    );
    again.initialize(room.deadline()).unwrap();
    assert!(run(&room, &mut again, &Command::flush(0)).is_good(0));
    // A reset of the machine: everything is gone at once, and the next boot is served.
    room.guest.quiesce(room.deadline()).unwrap();
    let mut booted = room.open_all(1).unwrap();
    assert!(run(&room, &mut booted[1], &Command::flush(0)).is_good(0));
}

#[test]
fn interrupts_go_to_the_vp_that_the_guest_wants() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(0).unwrap().remove(0);
    room.guest.retarget(&primary.channel, 3).unwrap();
    // The ping comes back after the message before it was handled.
    room.supervisor.ping(1, room.deadline()).unwrap();
    assert!(run(&room, &mut primary, &Command::flush(0)).is_good(0));
    let counters = primary.channel.counters();
    assert!(counters.interrupts > 0);
}

#[test]
fn an_idle_server_does_not_wake_up() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(3).unwrap().remove(0);
    assert!(run(&room, &mut primary, &Command::flush(0)).is_good(0));
    room.supervisor.ping(1, room.deadline()).unwrap();
    let switches = |room: &device_block::vsc::Room| -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", room.child.pid)).unwrap();
        let count = |name: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit('\t').next().unwrap().parse().unwrap()
        };
        count("voluntary_ctxt_switches")
    };
    // It goes to sleep once more after its pong.
    let asleep = |room: &device_block::vsc::Room| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", room.child.pid)).unwrap();
        stat.rsplit(") ").next().unwrap().starts_with('S')
    };
    let deadline = room.deadline();
    while !asleep(&room) {
        assert!(std::time::Instant::now() < deadline, "it does not go to sleep");
        std::thread::yield_now();
    }
    let before = switches(&room);
    // What is measured is a stretch of time without a wake-up.
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(switches(&room), before);
}

#[test]
fn the_supervisor_can_ask_about_the_state() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(1).unwrap().remove(0);
    run(&room, &mut primary, &Command::flush(0));
    let entries = room.supervisor.inspect(room.deadline()).unwrap();
    let value = |path: &str| {
        entries
            .iter()
            .find(|(name, _)| name == path)
            .map(|(_, value)| value.as_str())
    };
    assert_eq!(value("session"), Some("ready version=0x0602 sub_channels=1"));
    assert_eq!(value("disk/0/serial"), Some("SERIAL-1"));
    assert_eq!(value("channel/0/outstanding"), Some("0"));
    assert!(value("channel/1/relid").is_some());
}

#[test]
fn a_server_that_is_told_to_stop_ends_in_peace() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(0).unwrap().remove(0);
    run(&room, &mut primary, &Command::flush(0));
    assert!(room.stop().unwrap().is_success());
    room.start_successor().unwrap();
    assert!(run(&room, &mut primary, &Command::flush(0)).is_good(0));
}

#[test]
fn a_disk_that_cannot_be_used_is_refused_with_a_sentence() {
    let start = |disk: DiskConfig, fd| {
        let rooms = device_block::vsc::Room::new(
            program(),
            &controller(disk),
            vec![("disk".into(), fd)],
            Default::default(),
        );
        rooms.expect_err("it must not start").to_string()
    };
    let empty = image(0);
    assert!(start(disk_config(), open(empty.path())).contains("disk 0: it holds 0 bytes"));
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(start(disk_config(), null.into()).contains("neither a regular file nor a block device"));
    let small = image(4096);
    let wants = DiskConfig {
        bytes: Some(8192),
        ..disk_config()
    };
    assert!(start(wants, open(small.path())).contains("4096 bytes, and 8192 are configured"));
}
