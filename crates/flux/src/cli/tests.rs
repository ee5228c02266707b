//! The command line against a server in the same process.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
};

use super::*;

/// A server that answers each connection's bytes with the next of these replies, then closes it.
fn server(connections: Vec<Vec<&'static [u8]>>) -> (String, thread::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound listener").to_string();
    let serve = move || {
        let mut seen = Vec::new();
        for replies in connections {
            let (mut stream, _) = listener.accept().expect("a client");
            for reply in replies {
                seen.push(one_request(&mut stream));
                for piece in reply.chunks(3) {
                    stream.write_all(piece).expect("the client reads");
                }
            }
        }
        seen
    };
    (address, thread::spawn(serve))
}

fn one_request(stream: &mut TcpStream) -> String {
    let mut bytes = vec![0; 1024];
    let count = stream.read(&mut bytes).expect("the client writes");
    String::from_utf8_lossy(&bytes[..count]).into_owned()
}

#[test]
fn a_script_runs_line_by_line_and_remembers_errors() {
    let (address, served) = server(vec![vec![b"+OK\r\n", b"-ERR no\r\n", b"$2\r\nhi\r\n"]]);
    let mut connection = Connection::new(address, false);
    let mut out = Vec::new();
    let input = b"set k \"a b\"\n\n  frob\nget k\n";
    let code = script(&input[..], &mut connection, Style::Pretty, &mut out).expect("output works");
    assert_eq!(code, ERROR_REPLY);
    assert_eq!(String::from_utf8(out).unwrap(), "OK\n(error) ERR no\n\"hi\"\n");
    let seen = served.join().expect("the server is done");
    assert_eq!(seen[0], "*3\r\n$3\r\nset\r\n$1\r\nk\r\n$3\r\na b\r\n");
}

#[test]
fn a_lost_connection_is_said_and_made_anew() {
    let (address, served) = server(vec![vec![b""], vec![b"+PONG\r\n"]]);
    let mut connection = Connection::new(address.clone(), false);
    let ping = [b"PING".to_vec()];
    let error = connection.request(&ping).expect_err("the server closed the connection");
    assert!(matches!(error, ConnectionError::Lost { .. }), "{error}");
    assert!(error.to_string().contains(&address) && error.to_string().contains("may or may not"));
    assert!(!connection.is_open());
    assert_eq!(connection.request(&ping).unwrap(), Reply::Simple(b"PONG".into()));
    served.join().expect("the server is done");
}

#[test]
fn a_command_is_not_sent_on_a_connection_that_was_closed_before() {
    let (address, served) = server(vec![vec![b"+PONG\r\n"], vec![b"+PONG\r\n"]]);
    let mut connection = Connection::new(address, false);
    let ping = [b"PING".to_vec()];
    connection.request(&ping).expect("the first reply");
    // The close that follows the first reply is there once the server waits for the next client.
    connection.wait_for_close();
    let error = connection.request(&ping).expect_err("the server closed the connection");
    assert!(matches!(error, ConnectionError::Closed { .. }), "{error}");
    connection.request(&ping).expect("a new connection");
    assert_eq!(served.join().expect("the server is done").len(), 2);
}

#[test]
fn nobody_at_the_address_is_code_2() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound listener").to_string();
    drop(listener);
    let mut connection = Connection::new(address, false);
    let code = once(&[b"PING".to_vec()], &mut connection, Style::Raw, &mut Vec::new());
    assert_eq!(code.unwrap(), NO_REPLY);
}

#[test]
fn resp3_is_agreed_on_first() {
    let (address, served) = server(vec![vec![b"%1\r\n+proto\r\n:3\r\n", b">1\r\n+x\r\n_\r\n"]]);
    let mut connection = Connection::new(address, true);
    assert_eq!(connection.request(&[b"GET".to_vec(), b"k".to_vec()]).unwrap(), Reply::Null);
    assert_eq!(connection.take_pushes(), [Reply::Push(vec![Reply::Simple(b"x".into())])]);
    assert!(served.join().unwrap()[0].starts_with("*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n"));
}
