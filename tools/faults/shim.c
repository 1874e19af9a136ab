/* Faults of the file system, for one process: preloaded, it stands between the process and libc.

   Calls that change something under the path of fault_arm (writes, syncs, renames, new and removed
   files) are counted. From number `at` on, or at that one alone, they fail as `kind` says. Whoever
   wants to change that from outside, and the clock, writes to the file $FAULT_CONTROL. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, KILL, TORN, FULL, BROKEN, READ_ONLY, SLOW };
enum { FILES = 65536 };

static char under[PATH_MAX];
static long at, until;
static int kind = NONE;
static atomic_long seen;
static atomic_char watched[FILES]; /* Whether a descriptor is of a file under the path. */
static double clock_from, clock_jump;
static volatile struct { long kind; double clock_jump; } *control;

void fault_arm(const char *path, int what, long from, long to) {
  strncpy(under, path, sizeof under - 1);
  kind = what, at = from, until = to;
  atomic_store(&seen, 0);
}

long fault_seen(void) { return atomic_load(&seen); }

__attribute__((constructor)) static void from_environment(void) {
  const char *path = getenv("FAULT_PATH"), *jump = getenv("FAULT_CLOCK");
  if (path)
    fault_arm(path, atoi(getenv("FAULT_KIND")), atol(getenv("FAULT_AT")), atol(getenv("FAULT_TO")));
  if (jump) clock_jump = atof(jump), clock_from = atof(getenv("FAULT_CLOCK_FROM"));
  const char *outside = getenv("FAULT_CONTROL");
  int file = outside ? open(outside, O_RDONLY) : -1;
  if (file < 0) return;
  void *there = mmap(NULL, sizeof *control, PROT_READ, MAP_SHARED, file, 0);
  if (there != MAP_FAILED) control = there;
  close(file);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_under(const char *path) {
  char whole[PATH_MAX];
  if (!under[0] || !path) return 0;
  if (path[0] != '/') {
    if (!getcwd(whole, sizeof whole - strlen(path) - 2)) return 0;
    strcat(strcat(whole, "/"), path);
    path = whole;
  }
  return !strncmp(path, under, strlen(under));
}

/* The same of a path that may be relative to an open folder. */
static int is_under_at(int folder, const char *path) {
  char link[64], whole[PATH_MAX];
  if (!under[0] || !path) return 0;
  if (path[0] == '/' || folder == AT_FDCWD) return is_under(path);
  snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
  ssize_t n = readlink(link, whole, sizeof whole - 1);
  if (n < 0) return 0;
  whole[n] = 0;
  return !strncmp(whole, under, strlen(under));
}

static int is_watched(int file) { return file >= 0 && file < FILES && atomic_load(&watched[file]); }

/* Counts a call; 0 to let it through, 1 if it was failed, 2 to do half of it and die. */
static int fails(void) {
  long number = atomic_fetch_add(&seen, 1) + 1;
  int now = control ? (int)control->kind : kind;
  if (now == NONE || number < at || (until && number > until)) return 0;
  switch (now) {
    case KILL: kill(getpid(), SIGKILL); pause();
    case TORN: return 2;
    case FULL: errno = ENOSPC; return 1;
    case BROKEN: errno = EIO; return 1;
    case READ_ONLY: errno = EROFS; return 1;
    case SLOW: usleep(200 * 1000); return 0;
  }
  return 0;
}

static void die(void) { kill(getpid(), SIGKILL), pause(); }

static int opened(int file, const char *path, int flags) {
  if (file >= 0 && file < FILES)
    atomic_store(&watched[file], is_under(path) && (flags & (O_WRONLY | O_RDWR)));
  return file;
}

#define OPEN(name, PARAMETERS, ARGUMENTS)                            \
  int name PARAMETERS {                                              \
    mode_t mode = 0;                                                 \
    if (flags & (O_CREAT | O_TMPFILE)) {                             \
      va_list more;                                                  \
      va_start(more, flags), mode = va_arg(more, mode_t), va_end(more); \
    }                                                                \
    if ((flags & O_CREAT) && is_under(path)) {                       \
      int how = fails();                                             \
      if (how == 1) return -1;                                       \
      if (how == 2) die();                                           \
    }                                                                \
    return opened(NEXT(name) ARGUMENTS, path, flags);                \
  }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))

int close(int file) {
  if (file >= 0 && file < FILES) atomic_store(&watched[file], 0);
  return NEXT(close)(file);
}

#define WRITE(name, PARAMETERS, ARGUMENTS, HALF)    \
  ssize_t name PARAMETERS {                         \
    int how = is_watched(file) ? fails() : 0;       \
    if (how == 1) return -1;                        \
    if (how == 2) { NEXT(name) HALF; die(); }       \
    return NEXT(name) ARGUMENTS;                    \
  }

WRITE(write, (int file, const void *data, size_t size), (file, data, size), (file, data, size / 2))
WRITE(pwrite, (int file, const void *data, size_t size, off_t to), (file, data, size, to),
      (file, data, size / 2, to))
WRITE(pwrite64, (int file, const void *data, size_t size, off64_t to), (file, data, size, to),
      (file, data, size / 2, to))
WRITE(writev, (int file, const struct iovec *data, int n), (file, data, n), (file, data, n / 2))

#define CALL(name, PARAMETERS, ARGUMENTS, CONDITION) \
  int name PARAMETERS {                              \
    if (CONDITION) {                                 \
      int how = fails();                             \
      if (how == 1) return -1;                       \
      if (how == 2) die();                           \
    }                                                \
    return NEXT(name) ARGUMENTS;                     \
  }

CALL(fsync, (int file), (file), is_watched(file))
CALL(fdatasync, (int file), (file), is_watched(file))
CALL(ftruncate, (int file, off_t size), (file, size), is_watched(file))
CALL(rename, (const char *from, const char *to), (from, to), is_under(to))
CALL(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), is_under_at(b, to))
CALL(renameat2, (int a, const char *from, int b, const char *to, unsigned flags),
     (a, from, b, to, flags), is_under_at(b, to))
CALL(mkdir, (const char *path, mode_t mode), (path, mode), is_under(path))
CALL(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), is_under_at(folder, path))
CALL(unlink, (const char *path), (path), is_under(path))
CALL(unlinkat, (int folder, const char *path, int flags), (folder, path, flags),
     is_under_at(folder, path))
CALL(rmdir, (const char *path), (path), is_under(path))

/* The wall clock jumps by FAULT_CLOCK seconds, FAULT_CLOCK_FROM seconds after it was first read. */
int clock_gettime(clockid_t id, struct timespec *now) {
  static double first;
  int failed = NEXT(clock_gettime)(id, now);
  if (failed || id != CLOCK_REALTIME) return failed;
  if (control) now->tv_sec += (time_t)control->clock_jump;
  if (!clock_jump) return 0;
  if (!first) first = now->tv_sec;
  if (now->tv_sec - first >= clock_from) now->tv_sec += (time_t)clock_jump;
  return 0;
}
