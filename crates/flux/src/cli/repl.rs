//! The interactive command line: a prompt with history, completion and hints.
//!
//! The history is a file under `$XDG_STATE_HOME`, or `~/.local/state`; without a home there is
//! none. Lines that begin with a space, and AUTH, are not kept.

use std::{
    borrow::Cow,
    env, fs,
    io::{self, Write},
    path::PathBuf,
};

use rustyline::{
    Config, Context, Editor, Helper, completion::Completer, config::Configurer,
    error::ReadlineError, highlight::Highlighter, hint::Hinter, history::FileHistory,
    validate::Validator,
};

use super::{
    commands,
    connection::{Connection, ConnectionError},
    show::{Style, show},
    words,
};

/// Reads and carries out commands until the user leaves.
pub fn run(mut connection: Connection, style: Style) -> anyhow::Result<()> {
    let config = Config::builder().max_history_size(10_000)?.history_ignore_space(true).build();
    let mut editor: Editor<Assistant, FileHistory> = Editor::with_config(config)?;
    editor.set_helper(Some(Assistant));
    editor.set_auto_add_history(false);
    let history = history_file();
    if let Some(path) = &history {
        // There is none on the first run; a broken one is not worth refusing to start.
        let _ = editor.load_history(path);
    }
    if let Err(error) = connection.open() {
        say(&format!("{error}\n"))?;
    }
    loop {
        let prompt = match connection.is_open() {
            true => format!("{}> ", connection.address()),
            false => "not connected> ".to_owned(),
        };
        let line = match editor.readline(&prompt) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error.into()),
        };
        if !line.trim_start().to_lowercase().starts_with("auth") {
            editor.add_history_entry(&line)?;
        }
        if !carry_out(&line, &mut connection, style)? {
            break;
        }
    }
    if let Some(path) = &history {
        editor.append_history(path)?;
    }
    Ok(())
}

/// Carries out one line. False when it was the last.
fn carry_out(line: &str, connection: &mut Connection, style: Style) -> io::Result<bool> {
    let (first, rest) = line.trim().split_once(char::is_whitespace).unwrap_or((line.trim(), ""));
    match first.to_lowercase().as_str() {
        "" => return Ok(true),
        "exit" => return Ok(false),
        "help" | "?" => {
            say(&commands::help(rest))?;
            return Ok(true);
        }
        "clear" => {
            say("\x1b[H\x1b[2J")?;
            return Ok(true);
        }
        _ => {}
    }
    let quits = first.eq_ignore_ascii_case("quit");
    match words::split(line) {
        Err(error) => say(&format!("Invalid arguments: {error}\n"))?,
        Ok(args) => answer(&args, connection, style)?,
    }
    Ok(!quits)
}

/// Shows the reply to a command, or says what came instead. A command whose connection broke is not
/// sent again: it may have been carried out, or belong to a transaction that is gone.
fn answer(args: &[Vec<u8>], connection: &mut Connection, style: Style) -> io::Result<()> {
    let reply = connection.request(args);
    for push in connection.take_pushes() {
        io::stdout().write_all(&show(&push, style))?;
    }
    match reply {
        Ok(reply) => io::stdout().write_all(&show(&reply, style))?,
        Err(error @ (ConnectionError::Closed { .. } | ConnectionError::Lost { .. })) => {
            say(&format!("{error}\n"))?;
            match connection.open() {
                Ok(()) => say("Connected again; a transaction that was open is gone.\n")?,
                Err(error) => say(&format!("{error}\n"))?,
            }
        }
        Err(error) => say(&format!("{error}\n"))?,
    }
    Ok(())
}

fn say(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Where the history is kept; its folder is made.
fn history_file() -> Option<PathBuf> {
    let folder = env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".local/state")))?
        .join("flux");
    fs::create_dir_all(&folder).ok()?;
    Some(folder.join("cli_history"))
}

/// Completes and hints from the table of commands.
struct Assistant;

impl Completer for Assistant {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        Ok(complete(&line[..position]))
    }
}

/// Where the completed part begins, and what may stand there.
fn complete(typed: &str) -> (usize, Vec<String>) {
    let (start, word) = match typed.strip_prefix("help ") {
        Some(word) => (typed.len() - word.len(), word),
        None => (0, typed),
    };
    let capital = word.to_uppercase();
    let lower = word.chars().all(|c| !c.is_uppercase());
    let candidates = commands::all().map(|entry| entry.name).filter(|name| {
        // A name that is typed whole is not offered again.
        !word.is_empty() && name.starts_with(&capital) && *name != capital
    });
    let candidates = candidates.map(|name| if lower { name.to_lowercase() } else { name.into() });
    (start, candidates.collect())
}

impl Hinter for Assistant {
    type Hint = String;

    fn hint(&self, line: &str, position: usize, _: &Context<'_>) -> Option<String> {
        (position == line.len()).then(|| commands::arguments(line).map(str::to_owned)).flatten()
    }
}

impl Highlighter for Assistant {
    fn highlight_hint<'h>(&self, hint: &'h str) -> Cow<'h, str> {
        Cow::Owned(format!("\x1b[90m{hint}\x1b[0m"))
    }
}

impl Validator for Assistant {}

impl Helper for Assistant {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_completed_in_the_case_they_were_begun() {
        assert_eq!(complete("expiret"), (0, vec!["expiretime".to_owned()]));
        assert_eq!(complete("EXPIRET"), (0, vec!["EXPIRETIME".to_owned()]));
        assert_eq!(complete("help client k"), (5, vec!["client kill".to_owned()]));
        assert!(complete("get").1.contains(&"getrange".to_owned()));
        assert_eq!(complete("get k").1, Vec::<String>::new());
        assert_eq!(complete("").1, Vec::<String>::new());
    }
}
