//! What clients of the data port are told while a node waits for its cluster: why nothing is served.
//!
//! PING and INFO are answered, every other command is refused. Nothing is read or written here, and a node
//! that recovers its data does not come here: its clients wait for the moment that takes.

use std::io;
use std::time::Duration;

use flux_proto::Code;
use flux_proto::native::{ServerPreface, encode_server_preface, is_native};
use flux_proto::resp::{Args, Limits, Parsed, RequestParser, write};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::cluster::Waiting;
use crate::resp::REDIS_VERSION;

/// How long a node waits before it answers: most starts are over by then, and serve who came meanwhile.
const PATIENCE: Duration = Duration::from_millis(800);
/// Connections at one time; others wait until the node serves.
const MAX_CONNECTIONS: usize = 256;
/// Of a command that is longer than this no more is read.
const MAX_INPUT_BYTES: usize = 64 * 1024;
/// How long a connection may be silent, or take none of what is sent to it.
const SILENCE: Duration = Duration::from_secs(60);
/// A listener that fails is not asked again before that.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers whenever the node waits, until the future is dropped; whoever is connected then, or when it
/// stops waiting, is cut off.
pub(crate) async fn answer(listener: TcpListener, waiting: Waiting) {
    let mut watched = waiting.watch();
    loop {
        if watched.wait_for(Option::is_some).await.is_err() {
            return;
        }
        if tokio::time::timeout(PATIENCE, watched.wait_for(Option::is_none)).await.is_ok() {
            continue;
        }
        tokio::select! {
            () = accept(&listener, &waiting) => {}
            _ = watched.wait_for(Option::is_none) => {}
        }
    }
}

async fn accept(listener: &TcpListener, waiting: &Waiting) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    let waiting = waiting.clone();
                    connections.spawn(async move {
                        // Whoever is gone needs no answer.
                        let _ = serve(stream, &waiting).await;
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(mut stream: TcpStream, waiting: &Waiting) -> io::Result<()> {
    let (mut parser, mut input, mut output) =
        (RequestParser::new(Limits::default()), Vec::new(), Vec::new());
    loop {
        let read = tokio::time::timeout(SILENCE, stream.read_buf(&mut input)).await;
        if read.map_err(|_| io::ErrorKind::TimedOut)?? == 0 {
            return Ok(());
        }
        let reason = waiting.reason();
        let goes_on = if is_native(input[0]) {
            let refused =
                ServerPreface::Refused { code: Code::Unavailable.number(), message: &reason };
            encode_server_preface(&mut output, &refused);
            false
        } else {
            answer_all(&mut parser, &mut input, &mut output, &reason)
        };
        let written = tokio::time::timeout(SILENCE, stream.write_all(&output)).await;
        written.map_err(|_| io::ErrorKind::TimedOut)??;
        output.clear();
        if !goes_on {
            return stream.shutdown().await;
        }
    }
}

/// Answers the commands that are whole. False if the connection is to end.
fn answer_all(
    parser: &mut RequestParser,
    input: &mut Vec<u8>,
    output: &mut Vec<u8>,
    reason: &str,
) -> bool {
    let refusal = format!("LOADING {}", reason.replace(['\r', '\n'], " "));
    let mut start = 0;
    let goes_on = loop {
        let rest = &input[start..];
        match parser.parse(rest) {
            Ok(Parsed::Command { consumed }) => {
                let ends = answer_one(parser.args(rest), output, &refusal);
                start += consumed;
                if ends {
                    break false;
                }
            }
            Ok(Parsed::Incomplete { need }) if need.max(rest.len()) <= MAX_INPUT_BYTES => {
                break true;
            }
            Ok(Parsed::Incomplete { .. }) => {
                write::error(output, &refusal);
                break false;
            }
            Err(error) => {
                write::error(output, &format!("ERR {error}"));
                break false;
            }
        }
    };
    input.drain(..start);
    goes_on
}

/// Answers one command. True if the connection is to end.
fn answer_one(args: Args<'_>, output: &mut Vec<u8>, refusal: &str) -> bool {
    let is = |name: &str| args.at(0).eq_ignore_ascii_case(name.as_bytes());
    if args.is_empty() {
        return false;
    }
    if is("ping") {
        match args.get(1) {
            Some(message) => write::bulk(output, message),
            None => write::simple(output, "PONG"),
        }
    } else if is("info") {
        let state = refusal.trim_start_matches("LOADING ");
        let version = env!("CARGO_PKG_VERSION");
        let text = format!(
            "# Server\r\nredis_version:{REDIS_VERSION}\r\nflux_version:{version}\r\nflux_state:{state}\r\n\r\n\
             # Persistence\r\nloading:1\r\n"
        );
        write::bulk(output, text.as_bytes());
    } else if is("quit") {
        write::simple(output, "OK");
        return true;
    } else {
        write::error(output, refusal);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(input: &str) -> (bool, String) {
        let (mut parser, mut output) = (RequestParser::new(Limits::default()), Vec::new());
        let mut input = input.as_bytes().to_vec();
        let reason = "the node is starting: waiting for 1 more node";
        let goes_on = answer_all(&mut parser, &mut input, &mut output, reason);
        (goes_on, String::from_utf8(output).expect("text"))
    }

    #[test]
    fn commands_are_refused_and_ping_and_info_are_answered() {
        let refused = "-LOADING the node is starting: waiting for 1 more node\r\n";
        assert_eq!(
            answered("SET a b\r\n*2\r\n$3\r\nGET\r\n$1\r\na\r\n"),
            (true, refused.repeat(2))
        );
        assert_eq!(answered("PING\r\nping hi\r\n\r\n"), (true, "+PONG\r\n$2\r\nhi\r\n".to_owned()));
        let (_, info) = answered("INFO\r\n");
        assert!(info.contains("loading:1") && info.contains("waiting for 1 more node"), "{info}");
        assert_eq!(answered("QUIT\r\nPING\r\n"), (false, "+OK\r\n".to_owned()));
        assert_eq!(
            answered("*3\r\n$3\r\nSET\r\n$1\r\na\r\n$100000\r\nxy"),
            (false, refused.to_owned())
        );
        assert_eq!(answered("*3\r\n$3\r\nSE"), (true, String::new()));
        assert!(answered("*x\r\n").1.starts_with("-ERR Protocol error"));
    }
}
