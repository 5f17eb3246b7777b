/* Preloaded into a run: fails or kills it at one of its file-system calls on files below $FAULT_ROOT.

   FAULT_KIND   kill    SIGKILL just before the FAULT_AT-th call that changes something (from 1)
                torn    SIGKILL in the middle of the FAULT_AT-th call, if that is a write; else just before it
                full    from the FAULT_AT-th call on, calls that need space fail with ENOSPC
                read    opening files for reading whose path contains FAULT_MATCH fails with the errno FAULT_ERRNO,
                        the first FAULT_TIMES times
   FAULT_MARK   a file that is made when the fault is injected for the first time
   FAULT_LOG    a file that receives one line for each call that changes something: its name and path
*/
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int calls, failures;

static const char *setting(const char *name) {
  const char *value = getenv(name);
  return value ? value : "";
}

static int is(const char *kind) { return !strcmp(setting("FAULT_KIND"), kind); }

/* Whether a path, or the file of a descriptor, is below the root. */
static int is_below(int descriptor, const char *path, char *found) {
  const char *root = setting("FAULT_ROOT");
  char link[64];
  if (!*root) return 0;
  found[0] = 0;
  if (!path || path[0] != '/') {
    if (descriptor < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long length = readlink(link, found, PATH_MAX - 1);
    if (length < 0) return 0;
    found[length] = 0;
    if (path) strncat(strncat(found, "/", PATH_MAX - 1 - strlen(found)), path, PATH_MAX - 1 - strlen(found));
  } else {
    strncat(found, path, PATH_MAX - 1);
  }
  return !strncmp(found, root, strlen(root)) && !strstr(found, "/.lock");
}

static void mark(void) {
  if (*setting("FAULT_MARK"))
    syscall(SYS_close, syscall(SYS_openat, AT_FDCWD, setting("FAULT_MARK"), O_WRONLY | O_CREAT | O_EXCL, 0644));
}

static void end(void) {
  mark();
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* Counts a call that changes something; 1 if it must fail with errno set. `torn` is set if it is to be done by half. */
static int changes(const char *name, int needs_space, int descriptor, const char *path, int *torn) {
  char found[PATH_MAX + 1], line[PATH_MAX + 64];
  int kept = errno;
  if (!is_below(descriptor, path, found)) return errno = kept, 0;
  int number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST), at = atoi(setting("FAULT_AT"));
  if (*setting("FAULT_LOG")) {
    int log = syscall(SYS_openat, AT_FDCWD, setting("FAULT_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0644);
    int length = snprintf(line, sizeof line, "%s %s\n", name, found);
    syscall(SYS_write, log, line, length);
    syscall(SYS_close, log);
  }
  errno = kept;
  if (number == at && is("torn") && torn) return *torn = 1, 0;
  if (number == at && (is("kill") || is("torn"))) end();
  if (number >= at && is("full") && needs_space) return mark(), errno = ENOSPC, 1;
  return 0;
}

static int read_fails(const char *path) {
  char found[PATH_MAX + 1];
  if (!is("read") || !is_below(-1, path, found) || !strstr(found, setting("FAULT_MATCH"))) return 0;
  if (__atomic_add_fetch(&failures, 1, __ATOMIC_SEQ_CST) > atoi(setting("FAULT_TIMES"))) return 0;
  mark();
  errno = atoi(setting("FAULT_ERRNO"));
  return 1;
}

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

static int opened(const char *name, int directory, const char *path, int flags, mode_t mode) {
  if (flags & (O_WRONLY | O_RDWR | O_CREAT)) {
    if (changes(name, flags & O_CREAT, directory, path, NULL)) return -1;
  } else if (read_fails(path)) {
    return -1;
  }
  return syscall(SYS_openat, directory, path, flags, mode);
}

#define MODE(flags) \
  mode_t mode = 0; \
  if (flags & (O_CREAT | __O_TMPFILE)) { \
    va_list list; \
    va_start(list, flags); \
    mode = va_arg(list, mode_t); \
    va_end(list); \
  }

int open(const char *path, int flags, ...) { MODE(flags) return opened("open", AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened("open", AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return opened("open", at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return opened("open", at, path, flags, mode); }

DIR *opendir(const char *path) {
  return read_fails(path) ? NULL : REAL(DIR *, "opendir", const char *)(path);
}

ssize_t write(int descriptor, const void *data, size_t size) {
  int torn = 0;
  if (changes("write", 1, descriptor, NULL, &torn)) return -1;
  if (torn) {
    syscall(SYS_write, descriptor, data, size / 2);
    end();
  }
  return syscall(SYS_write, descriptor, data, size);
}

int fsync(int descriptor) { return changes("fsync", 1, descriptor, NULL, NULL) ? -1 : (int)syscall(SYS_fsync, descriptor); }
int ftruncate64(int descriptor, off64_t size) {
  return changes("ftruncate", 0, descriptor, NULL, NULL) ? -1 : (int)syscall(SYS_ftruncate, descriptor, size);
}
int ftruncate(int descriptor, off_t size) { return ftruncate64(descriptor, size); }
int mkdir(const char *path, mode_t mode) {
  return changes("mkdir", 1, -1, path, NULL) ? -1 : (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}
int rename(const char *from, const char *to) {
  return changes("rename", 0, -1, to, NULL) ? -1 : (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int unlink(const char *path) {
  return changes("unlink", 0, -1, path, NULL) ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}
int unlinkat(int at, const char *path, int flags) {
  return changes("unlink", 0, at, path, NULL) ? -1 : (int)syscall(SYS_unlinkat, at, path, flags);
}
int rmdir(const char *path) {
  return changes("rmdir", 0, -1, path, NULL) ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR);
}
