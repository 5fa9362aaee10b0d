//! What copies beside launches are checked for: that both wait for each other.

use std::sync::Arc;

use longshore_cuda::{Buffer, Device, Error, Kernel, Launch, Mark, Queue, Source};

use super::device::Emulator;

const SOURCE: Source = Source { name: "faults.cu", text: include_str!("faults.cu") };
const PAGE: usize = 4096;

struct Trial {
    device: Arc<dyn Device>,
    buffer: Arc<Buffer>,
}

impl Trial {
    /// Four pages of zeros.
    fn new() -> Self {
        let device = Emulator::device();
        let buffer = Arc::new(Buffer::from_slice(&device, &[0_u8; 4 * PAGE]).unwrap());
        Self { device, buffer }
    }

    fn wait(&self, for_: Queue, queue: Queue) {
        Mark::new(&self.device, for_).unwrap().hold_up(queue).unwrap();
    }

    /// Copies to the second and the third page, and half of the fourth.
    fn copy(&self) -> Result<(), Error> {
        self.buffer.span(PAGE, 5 * PAGE / 2)?.write_apart(&[1_u8; 5 * PAGE / 2])
    }

    /// Copies the word at `offset` to the first.
    fn load(&self, offset: usize) -> Result<(), Error> {
        let kernel = Kernel { source: SOURCE, entry: "load_misaligned", constants: Vec::new() };
        let argument = [self.buffer.address(), offset as u64];
        self.device.launch(&Launch::new(&kernel, [1, 1, 1], 32, &argument))
    }
}

fn says(outcome: Result<(), Error>, words: &str) {
    let problem = outcome.expect_err(words).to_string();
    assert!(problem.contains(words), "`{words}` is not in: {problem}");
}

#[test]
fn what_was_copied_can_be_used_by_who_waited() {
    let trial = Trial::new();
    trial.wait(Queue::Compute, Queue::Arrivals);
    trial.copy().unwrap();
    // What is not being copied may be used.
    trial.load(8).unwrap();
    trial.wait(Queue::Arrivals, Queue::Compute);
    for offset in [PAGE, 2 * PAGE + 4, 3 * PAGE] {
        trial.load(offset).unwrap();
        assert_eq!(trial.buffer.span(0, 4).unwrap().read_word(), 0x0101_0101, "{offset}");
    }
    // Again, when that was waited for.
    trial.wait(Queue::Compute, Queue::Arrivals);
    trial.copy().unwrap();
    trial.device.synchronize().unwrap();
    assert_eq!(trial.buffer.to_vec::<u8>().unwrap()[PAGE..7 * PAGE / 2], [1; 5 * PAGE / 2]);
}

trait ReadWord {
    fn read_word(&self) -> u32;
}

impl ReadWord for longshore_cuda::Span<'_> {
    fn read_word(&self) -> u32 {
        let mut word = [0_u32];
        self.read(&mut word).unwrap();
        word[0]
    }
}

#[test]
fn a_use_before_the_copy_was_waited_for_is_found() {
    let trial = Trial::new();
    trial.wait(Queue::Compute, Queue::Arrivals);
    let early = Mark::new(&trial.device, Queue::Arrivals).unwrap();
    trial.copy().unwrap();
    // A mark before the copy tells nothing of it.
    early.hold_up(Queue::Compute).unwrap();
    says(trial.load(2 * PAGE), "access to address");
    says(trial.buffer.span(2 * PAGE, 4).unwrap().write(&[0_u32]), "is written while");
    says(trial.buffer.span(2 * PAGE, 4).unwrap().read(&mut [0_u32]), "is read while");
    says(trial.copy(), "is copied to while");
    trial.wait(Queue::Arrivals, Queue::Compute);
    trial.load(2 * PAGE).unwrap();
    assert_eq!(trial.buffer.span(0, 4).unwrap().read_word(), 0x0101_0101);
}

#[test]
fn half_a_page_that_is_being_copied_is_nan() {
    let trial = Trial::new();
    trial.wait(Queue::Compute, Queue::Arrivals);
    trial.copy().unwrap();
    trial.load(3 * PAGE).unwrap();
    let word = trial.buffer.span(0, 4).unwrap().read_word();
    assert!(f32::from_bits(word).is_nan(), "{word:#x}");
    trial.device.synchronize().unwrap();
}

#[test]
fn a_copy_to_what_launches_may_still_use_is_found() {
    let trial = Trial::new();
    // The memory is new, and what had it before may still be queued.
    says(trial.copy(), "launches may use them");
    let before = Mark::new(&trial.device, Queue::Compute).unwrap();
    before.hold_up(Queue::Arrivals).unwrap();
    trial.copy().unwrap();
    trial.wait(Queue::Arrivals, Queue::Compute);
    trial.load(PAGE).unwrap();
    // A mark before that launch tells nothing of it.
    before.hold_up(Queue::Arrivals).unwrap();
    says(trial.copy(), "launches may use them");
    trial.wait(Queue::Compute, Queue::Arrivals);
    trial.copy().unwrap();
    trial.device.synchronize().unwrap();
}

#[test]
fn memory_that_is_given_back_during_a_copy_is_found() {
    let trial = Trial::new();
    let other = Buffer::new(&trial.device, PAGE).unwrap();
    trial.device.upload(other.whole(), &[0; PAGE]).unwrap();
    trial.wait(Queue::Compute, Queue::Arrivals);
    other.whole().write_apart(&[1_u8; PAGE]).unwrap();
    drop(other);
    says(trial.device.synchronize(), "is given back while");
}

#[test]
fn what_departs_is_taken_later_in_any_order() {
    let trial = Trial::new();
    trial.buffer.span(0, 8).unwrap().write(&[7_u32, 8]).unwrap();
    let first = trial.buffer.depart(0, 4).unwrap().unwrap();
    let second = trial.buffer.depart(4, 4).unwrap().unwrap();
    // Launches behind them change other memory.
    trial.buffer.span(PAGE, 4).unwrap().write(&[1_u32]).unwrap();
    let (mut one, mut other) = ([0_u32], [0_u32]);
    second.collect(&mut other).unwrap();
    first.collect(&mut one).unwrap();
    assert_eq!((one, other), ([7], [8]));
    let refused = trial.buffer.depart(0, 4).unwrap().unwrap();
    says(refused.collect(&mut [0_u64]), "`departure` has 8 bytes, 4 departed");
    trial.device.synchronize().unwrap();
}

#[test]
fn memory_that_changes_or_goes_while_it_departs_is_found() {
    let trial = Trial::new();
    let departure = trial.buffer.depart(0, 4).unwrap().unwrap();
    trial.buffer.span(PAGE, 4).unwrap().write(&[3_u32]).unwrap();
    trial.load(PAGE).unwrap();
    says(departure.collect(&mut [0_u32]), "were written to while they departed");
    // Also where nobody takes it.
    let departure = trial.buffer.depart(PAGE, 4).unwrap().unwrap();
    trial.buffer.span(PAGE, 4).unwrap().write(&[4_u32]).unwrap();
    drop(departure);
    says(trial.device.synchronize(), "were written to while they departed");
    let other = Buffer::from_slice(&trial.device, &[0_u32]).unwrap();
    let departure = trial.device.depart(other.whole()).unwrap().unwrap();
    drop(other);
    says(trial.device.synchronize(), "is given back while departure");
    says(trial.device.collect(departure, &mut [0; 4]), "no departure");
    // Who holds one holds its memory.
    let other = Arc::new(Buffer::from_slice(&trial.device, &[9_u32]).unwrap());
    let (departure, mut found) = (other.depart(0, 4).unwrap().unwrap(), [0_u32]);
    drop(other);
    departure.collect(&mut found).unwrap();
    assert_eq!(found, [9]);
    trial.device.synchronize().unwrap();
}
