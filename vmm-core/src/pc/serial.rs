#![forbid(unsafe_code)]
//! The serial console: a 16550 (of `vm-superio`) between the guest and two queues.
//!
//! | queue | filled by | emptied by | when full |
//! | --- | --- | --- | --- |
//! | output ([`Output`]) | vCPU threads | the console thread, which may block on a slow reader | bytes are dropped and counted |
//! | input | the control thread | the guest, through the 16550's FIFO | the control thread stops reading |
//!
//! A vCPU thread never waits for whoever reads the console. The console thread is woken at the first byte of a
//! burst and at the end of a line, not at each byte.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

/// First port of COM1, how many there are, and its interrupt: as on every PC.
pub const COM1_BASE: u16 = 0x3F8;
pub const COM1_PORTS: u8 = 8;
pub const COM1_GSI: u32 = 4;

/// Limit: output that waits for its reader; a few seconds of a guest that prints as fast as it can.
const MAX_OUTPUT_BYTES: usize = 256 * 1024;
/// Limit: input that waits for the guest; a page of pasted text.
const MAX_INPUT_BYTES: usize = 4096;
/// How long the console thread waits for the rest of a line.
const LINE_PATIENCE: Duration = Duration::from_millis(5);

/// What the guest has printed and the console thread has not yet written.
#[derive(Debug, Default)]
pub struct Output {
    state: Mutex<OutputState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct OutputState {
    bytes: Vec<u8>,
    line_complete: bool,
    /// Nobody reads any more: whatever comes is dropped.
    reader_gone: bool,
    closed: bool,
    written: u64,
    dropped: u64,
}

impl Output {
    /// Waits for output: a whole line, or what is there when no more comes for a moment. `None` once closed and
    /// empty.
    pub fn take(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        while state.bytes.is_empty() {
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if !state.line_complete && !state.closed {
            let waited = self.changed.wait_timeout_while(state, LINE_PATIENCE, |state| {
                !state.line_complete && !state.closed
            });
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.line_complete = false;
        Some(std::mem::take(&mut state.bytes))
    }

    /// The reader is gone: drop what waits and whatever comes.
    pub fn drop_all(&self) {
        let mut state = self.lock();
        state.reader_gone = true;
        state.dropped += state.bytes.len() as u64;
        state.bytes = Vec::new();
    }

    /// No more output comes: the console thread ends when all is written.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Bytes that the guest printed, and how many of them were dropped.
    pub fn counters(&self) -> (u64, u64) {
        let state = self.lock();
        (state.written, state.dropped)
    }

    fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.written += bytes.len() as u64;
        if state.reader_gone || state.bytes.len() + bytes.len() > MAX_OUTPUT_BYTES {
            state.dropped += bytes.len() as u64;
            return;
        }
        let was_empty = state.bytes.is_empty();
        state.bytes.extend_from_slice(bytes);
        let line = bytes.contains(&b'\n');
        state.line_complete |= line;
        drop(state);
        if was_empty || line {
            self.changed.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, OutputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `Write` for the 16550.
struct OutputEnd(Arc<Output>);

impl io::Write for OutputEnd {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The interrupt line, edge-triggered: an irqfd.
struct InterruptLine(Arc<EventFd>);

impl Trigger for InterruptLine {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The 16550 and its input queue.
pub struct Console {
    output: Arc<Output>,
    interrupt: Arc<EventFd>,
    serial: Serial<InterruptLine, NoEvents, OutputEnd>,
    input: VecDeque<u8>,
    /// Written when a full input queue has room again.
    room: EventFd,
    input_was_full: bool,
}

impl Console {
    /// A serial port in its reset state. `interrupt` is an irqfd on [`COM1_GSI`].
    pub fn new(output: Arc<Output>, interrupt: EventFd, room: EventFd) -> Self {
        let interrupt = Arc::new(interrupt);
        let serial = Serial::new(InterruptLine(interrupt.clone()), OutputEnd(output.clone()));
        Self {
            output,
            interrupt,
            serial,
            input: VecDeque::new(),
            room,
            input_was_full: false,
        }
    }

    /// Resets the port, as a reset of the machine does. Input that waits is for the next boot.
    pub fn reset(&mut self) {
        let output = OutputEnd(self.output.clone());
        self.serial = Serial::new(InterruptLine(self.interrupt.clone()), output);
    }

    /// Bytes that the guest printed, and how many of them were dropped.
    pub fn output_counters(&self) -> (u64, u64) {
        self.output.counters()
    }

    /// Whether the port is one of ours.
    pub fn claims(port: u16) -> bool {
        (COM1_BASE..COM1_BASE + u16::from(COM1_PORTS)).contains(&port)
    }

    /// A byte from the guest to one of our ports.
    pub fn write(&mut self, port: u16, value: u8) {
        // An error is a full interrupt eventfd: it is raised already. Output cannot fail.
        self.serial.write((port - COM1_BASE) as u8, value).ok();
        self.refill();
    }

    /// A byte to the guest from one of our ports.
    pub fn read(&mut self, port: u16) -> u8 {
        let value = self.serial.read((port - COM1_BASE) as u8);
        self.refill();
        value
    }

    /// Queues input for the guest. The caller offers no more than [`Self::input_room`] bytes.
    pub fn offer_input(&mut self, bytes: &[u8]) {
        self.input.extend(bytes.iter().take(self.input_room()));
        self.input_was_full = self.input_room() == 0;
        self.refill();
    }

    /// Bytes of input that fit.
    pub fn input_room(&self) -> usize {
        MAX_INPUT_BYTES.saturating_sub(self.input.len())
    }

    /// Moves input into the 16550 as far as its FIFO has room. In loop-back mode it takes none.
    fn refill(&mut self) {
        while !self.input.is_empty() && self.serial.fifo_capacity() > 0 {
            let wanted = self.serial.fifo_capacity().min(self.input.len());
            let next: Vec<u8> = self.input.iter().copied().take(wanted).collect();
            match self.serial.enqueue_raw_bytes(&next) {
                Ok(taken) if taken > 0 => drop(self.input.drain(..taken)),
                // Taken, too; only the interrupt was pending already.
                Err(vm_superio::serial::Error::Trigger(_)) => drop(self.input.drain(..wanted)),
                _ => break,
            }
        }
        if self.input_was_full && self.input_room() > 0 {
            self.input_was_full = false;
            // A full eventfd is as good as a written one.
            self.room.write(1).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IER: u16 = COM1_BASE + 1;
    const LSR: u16 = COM1_BASE + 5;

    fn console() -> (Console, Arc<Output>, EventFd, EventFd) {
        let event = || EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let (interrupt, room, output) = (event(), event(), Arc::new(Output::default()));
        let clone = |event: &EventFd| event.try_clone().expect("dup");
        (
            Console::new(output.clone(), clone(&interrupt), clone(&room)),
            output,
            interrupt,
            room,
        )
    }

    #[test]
    fn a_line_is_taken_whole_by_the_console_thread() {
        let (mut console, output, _, _) = console();
        for byte in b"hello\n" {
            console.write(COM1_BASE, *byte);
        }
        assert_eq!(output.take().as_deref(), Some(b"hello\n".as_slice()));
        output.close();
        assert_eq!(output.take(), None);
    }

    #[test]
    fn a_prompt_without_a_newline_is_not_held_back() {
        let (mut console, output, _, _) = console();
        console.write(COM1_BASE, b'#');
        assert_eq!(output.take().as_deref(), Some(b"#".as_slice()));
    }

    #[test]
    fn input_beyond_the_fifo_waits_and_is_read_in_order() {
        let (mut console, _, interrupt, _) = console();
        console.write(IER, 1);
        let sent: Vec<u8> = (0..200).collect();
        console.offer_input(&sent);
        assert_eq!(interrupt.read().expect("raised"), 1);
        let mut received = Vec::new();
        while console.read(LSR) & 1 != 0 {
            received.push(console.read(COM1_BASE));
        }
        assert_eq!(received, sent);
    }

    #[test]
    fn a_full_input_queue_says_when_it_has_room_again() {
        let (mut console, _, _, room) = console();
        console.offer_input(&vec![b'x'; console.input_room()]);
        console.offer_input(&vec![b'y'; console.input_room()]);
        assert_eq!(console.input_room(), 0);
        room.read().expect("the first refill already made room once");
        assert!(room.read().is_err());
        console.read(COM1_BASE);
        assert_eq!(room.read().expect("said so"), 1);
        assert!(console.input_room() > 0);
    }

    #[test]
    fn output_nobody_reads_is_dropped_and_counted() {
        let (mut console, output, _, _) = console();
        console.write(COM1_BASE, b'a');
        output.drop_all();
        console.write(COM1_BASE, b'b');
        assert_eq!(output.counters(), (2, 2));
        output.close();
        assert_eq!(output.take(), None);
    }

    #[test]
    fn output_is_bounded() {
        let output = Output::default();
        for _ in 0..MAX_OUTPUT_BYTES / 4096 + 1 {
            output.push(&[b'z'; 4096]);
        }
        assert_eq!(output.counters().1, 4096);
        assert_eq!(output.take().map(|bytes| bytes.len()), Some(MAX_OUTPUT_BYTES));
    }
}
