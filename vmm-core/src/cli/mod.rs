#![forbid(unsafe_code)]
//! The command line of `bulkhead`.

mod device;
mod doctor;
mod events;
mod run;
mod talk;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::spec::Name;
use crate::supervisor::folder::base;
use crate::supervisor::keeper;
use crate::supervisor::report::{EXIT_STATUS_HELP, say};

const RUN_EXAMPLES: &str = "\
Examples:
  bulkhead run --kernel vmlinuz --initrd initrd.img --memory 512M
  bulkhead run --kernel vmlinuz --disk root.img --net user --cmdline 'console=ttyS0 root=/dev/sda'
  bulkhead run --config web.toml --vcpus 4

A file says the same as the flags:
  name = \"web\"
  kernel = \"vmlinuz\"          # relative to the file
  memory = \"1G\"
  vcpus = 2
  [[disk]]
  path = \"root.img\"
  [[net]]
  tap = \"tap0\"
";

const ADOPT_HELP: &str = "\
A VM goes on when its supervisor is killed, but nobody restarts its servers then, and nobody
answers bulkhead inspect or stop. This command runs until the VM ends, as bulkhead run does. The
guest's console stays where it was; on the same terminal one can type again. A VM that another version
of bulkhead has started is adopted by that version, whatever file has its name now.

A service manager does the same by itself, for example with a unit for systemd:
  [Service]
  ExecStart=/usr/bin/bulkhead run --config /etc/bulkhead/web.toml --name web --console none --adopt
  KillMode=process
  OOMPolicy=continue
  Restart=on-failure
  RestartPreventExitStatus=2
  SuccessExitStatus=143
KillMode and OOMPolicy leave the VM's other processes alone when the supervisor, or one of them, is
killed. 2: a mistake in the description, which a restart does not mend. 143: systemctl stop.
";

#[derive(Parser)]
#[command(
    name = "bulkhead",
    version,
    about = "Runs Linux guests with each device in a sandboxed process of its own"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a VM until it ends
    #[command(after_help = format!("{RUN_EXAMPLES}\n{EXIT_STATUS_HELP}"))]
    Run(Box<run::RunArgs>),
    /// Become the supervisor of a VM whose supervisor was killed
    #[command(after_help = ADOPT_HELP)]
    Adopt {
        /// The VM's name
        vm: Name,
        /// Where the folders of running VMs are
        #[arg(long, value_name = "FOLDER", hide = true)]
        run_folder: Option<PathBuf>,
    },
    /// Say what this host can do for VMs, and what to do about what is missing
    Doctor(doctor::DoctorArguments),
    /// List the VMs of this user that run
    List,
    /// Show what the processes of a running VM know about themselves
    Inspect {
        /// The VM's name
        vm: Name,
        /// Show only what begins with this, for example bus or disk0
        path: Option<String>,
    },
    /// End a running VM at once, or press its power button
    Stop {
        /// The VM's name
        vm: Name,
        /// Press the power button, and leave the rest to the guest
        #[arg(long)]
        power_button: bool,
    },
    /// Show what happened to a VM that runs or ran: deaths, restarts, stalls, swaps, its end
    Events {
        /// The VM's name
        vm: Name,
        /// Go on until the VM ends
        #[arg(long, short)]
        follow: bool,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
        /// Where the folders of VMs are
        #[arg(long, value_name = "FOLDER", hide = true)]
        run_folder: Option<PathBuf>,
    },
    /// List the crash reports of a VM that runs or ran, or show one
    Crashes {
        /// The VM's name
        vm: Name,
        /// The report's number
        #[arg(value_parser = report_number)]
        number: Option<u64>,
        /// Where the folders of VMs are
        #[arg(long, value_name = "FOLDER", hide = true)]
        run_folder: Option<PathBuf>,
    },
    /// Do something to a device of a running VM
    Device {
        #[command(subcommand)]
        command: device::DeviceCommand,
        /// Where the folders of running VMs are
        #[arg(long, value_name = "FOLDER", hide = true, global = true)]
        run_folder: Option<PathBuf>,
    },
}

/// The program.
pub fn main() -> ExitCode {
    // Not a command for people, and without a parser, which would be half of that process's memory.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|first| first == keeper::ARGUMENT)
    {
        return keeper::holder::main();
    }
    let result = match Cli::parse().command {
        Command::Run(args) => return run::run(*args),
        Command::Adopt { vm, run_folder } => return run::adopt(&vm, run_folder),
        Command::Doctor(arguments) => return doctor::main(arguments),
        Command::List => talk::list(),
        Command::Inspect { vm, path } => talk::inspect(&vm, path.as_deref()),
        Command::Events {
            vm,
            follow,
            json,
            run_folder,
        } => events::events(&vm, &run_folder.unwrap_or_else(base), follow, json),
        Command::Crashes {
            vm,
            number,
            run_folder,
        } => events::crashes(&vm, &run_folder.unwrap_or_else(base), number),
        Command::Device { command, run_folder } => device::main(command, &run_folder.unwrap_or_else(base)),
        Command::Stop { vm, power_button } => talk::stop(&vm, power_button),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn report_number(text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| "it is no number of a crash report: without one they are listed".to_owned())
}

/// Where the other programs are: beside this one.
fn programs() -> std::io::Result<PathBuf> {
    let this = std::env::current_exe()?;
    Ok(this.parent().map(PathBuf::from).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn refused(args: &[&str]) -> String {
        let all = ["bulkhead", "run"].iter().chain(args);
        match Cli::try_parse_from(all) {
            Ok(_) => panic!("{args:?} is accepted"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn mistakes_in_flags_are_named() {
        for (args, part) in [
            (&["--memory", "512"][..], "\"512\" is no size"),
            (&["--vcpus", "65"], "65 virtual processors"),
            (
                &["--disk", "path=a,raedonly"],
                "\"raedonly\" is nothing that is said of a disk",
            ),
            (&["--net", "user,mac=1"], "\"1\" is no MAC address"),
            (
                &["--console", "stdio", "--console", "none"],
                "cannot be used multiple times",
            ),
            (&["--on-crash", "explode"], "say report or exit"),
            (&["--patience", "x"], "\"x\" is no number of seconds"),
            (&["--log", "ifno"], "\"ifno\" is nothing that can be logged"),
            (&["--restart", "never"], "say careful, always or or-end"),
            (&["--name", "../x"], "is no name for a VM"),
        ] {
            let said = refused(args);
            assert!(said.contains(part), "{args:?}: {said}");
        }
    }

    #[test]
    fn help_says_the_exit_statuses() {
        let mut command = Cli::command();
        let run = command.find_subcommand_mut("run").expect("there is a run");
        assert!(
            run.render_long_help()
                .to_string()
                .contains("3      the guest's kernel crashed")
        );
    }
}
