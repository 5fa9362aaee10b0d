//! Errors survive the trip through a status.

use std::time::Duration;

use super::{code_from_number, code_number, from_status, to_status};
use crate::{Code, Error};

const CODES: [Code; 11] = [
    Code::Cancelled,
    Code::InvalidArgument,
    Code::DeadlineExceeded,
    Code::NotFound,
    Code::ResourceExhausted,
    Code::FailedPrecondition,
    Code::OutOfRange,
    Code::Unimplemented,
    Code::Internal,
    Code::Unavailable,
    Code::DataLoss,
];

#[test]
fn every_code_survives_with_its_details() {
    for code in CODES {
        let plain = Error::new(code, "the `thing` is wrong");
        assert_eq!(from_status(&to_status(&plain)), plain);
        let full = plain.with_field("start.sampling.seed").with_retry_after(Duration::from_millis(1500));
        assert_eq!(from_status(&to_status(&full)), full);
        assert_eq!(code_from_number(code_number(code)), Some(code));
    }
}

#[test]
fn numbers_that_are_no_code_are_refused() {
    assert_eq!(code_from_number(0), None);
    assert_eq!(code_from_number(17), None);
    assert_eq!(code_from_number(u32::MAX), None);
}

#[test]
fn foreign_codes_map_to_ours() {
    let check = |foreign, ours| assert_eq!(from_status(&tonic::Status::new(foreign, "x")).code, ours);
    check(tonic::Code::Aborted, Code::Unavailable);
    check(tonic::Code::Unauthenticated, Code::FailedPrecondition);
    check(tonic::Code::PermissionDenied, Code::FailedPrecondition);
    check(tonic::Code::Unknown, Code::Internal);
}

#[test]
fn details_that_are_no_protobuf_are_ignored() {
    let status = tonic::Status::with_details(
        tonic::Code::NotFound,
        "gone",
        bytes::Bytes::from_static(b"\xff\xff\xff"),
    );
    assert_eq!(from_status(&status), Error::new(Code::NotFound, "gone"));
}
