//! Ethernet frames: the little of IP, TCP and UDP that offloads need.
//!
//! - [`headers`]: where the headers of a frame are.
//! - [`checksum`]: the Internet checksum.
//! - [`outgoing`]: what must be done to a guest's frame before a backend sends it: a VLAN tag put in, headers
//!   completed; then either a `virtio_net_hdr` tells a TAP the rest, or it is done here.
//! - [`segment`]: one large TCP frame into many that fit a link.
//! - [`vnet`]: the header that a TAP puts before each frame.
//!
//! Input is always a private copy; lengths come from whoever sent the frame and are believed by nobody.

pub mod checksum;
pub mod headers;
pub mod outgoing;
pub mod segment;
pub mod vnet;
