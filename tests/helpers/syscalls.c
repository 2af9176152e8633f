/* Preloaded into a process (LD_PRELOAD), this counts the calls that touch files under one folder, and lets the n-th one fail, or the
   process be killed or interrupted before it. Armed from Python by `faults_arm`; see faults.py. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MOST = 4096 };
static long count, at = -1;
static int fault; /* an errno to fail with; -9 and -2: SIGKILL and SIGINT before the call */
static int armed;
static char root[4096], last[64];
static char watched[MOST];

void faults_arm(const char *folder, long n, int what) {
    strncpy(root, folder, sizeof root - 1);
    at = n, fault = what, count = 0, armed = 1;
    memset(watched, 0, sizeof watched);
}
long faults_count(void) { return count; }
const char *faults_last(void) { return last; }
void faults_disarm(void) { armed = 0; }

static int inside(int folder, const char *path) {
    if (!armed || !path) return 0;
    if (path[0] == '/') return strncmp(path, root, strlen(root)) == 0;
    return folder == AT_FDCWD || (folder >= 0 && folder < MOST && watched[folder]);
}
static int known(int file) { return armed && file >= 0 && file < MOST && watched[file]; }

/* Whether the call is to fail; errno is set. */
static int fails(const char *name) {
    if (__atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST) != at) return 0;
    strncpy(last, name, sizeof last - 1);
    if (fault == -9) kill(getpid(), SIGKILL);
    if (fault == -2) { kill(getpid(), SIGINT); return 0; }
    errno = fault;
    return 1;
}

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))
#define WRAP(result, name, parameters, arguments, when, failed)                \
    result name parameters {                                                   \
        static result(*real) parameters;                                       \
        if (!real) real = (result(*) parameters)dlsym(RTLD_NEXT, #name);       \
        if ((when) && fails(#name)) return failed;                             \
        return real arguments;                                                 \
    }

static int note(int file, int yes) {
    if (armed && file >= 0 && file < MOST) watched[file] = yes;
    return file;
}

#define OPEN(name)                                                             \
    int name(const char *path, int flags, ...) {                               \
        static int (*real)(const char *, int, ...);                            \
        va_list more; va_start(more, flags);                                   \
        mode_t mode = va_arg(more, mode_t); va_end(more);                      \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        int yes = inside(AT_FDCWD, path);                                      \
        if (yes && fails("open")) return -1;                                   \
        return note(real(path, flags, mode), yes);                             \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                           \
    int name(int folder, const char *path, int flags, ...) {                   \
        static int (*real)(int, const char *, int, ...);                       \
        va_list more; va_start(more, flags);                                   \
        mode_t mode = va_arg(more, mode_t); va_end(more);                      \
        if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        int yes = inside(folder, path);                                        \
        if (yes && fails("open")) return -1;                                   \
        return note(real(folder, path, flags, mode), yes);                     \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int file) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "close");
    int yes = known(file), failed = yes && fails("close"), code = errno;
    note(file, 0);
    int done = real(file);
    if (failed) { errno = code; return -1; }
    return done;
}

WRAP(ssize_t, read, (int file, void *to, size_t size), (file, to, size), known(file), -1)
WRAP(ssize_t, pread, (int file, void *to, size_t size, off_t from), (file, to, size, from), known(file), -1)
WRAP(ssize_t, pread64, (int file, void *to, size_t size, off64_t from), (file, to, size, from), known(file), -1)
WRAP(ssize_t, preadv, (int file, const struct iovec *to, int n, off_t from), (file, to, n, from), known(file), -1)
WRAP(ssize_t, preadv64, (int file, const struct iovec *to, int n, off64_t from), (file, to, n, from), known(file), -1)
WRAP(ssize_t, preadv64v2, (int file, const struct iovec *to, int n, off64_t from, int flags), (file, to, n, from, flags), known(file), -1)
WRAP(ssize_t, readv, (int file, const struct iovec *to, int n), (file, to, n), known(file), -1)
WRAP(ssize_t, write, (int file, const void *from, size_t size), (file, from, size), known(file), -1)
WRAP(ssize_t, pwrite, (int file, const void *from, size_t size, off_t to), (file, from, size, to), known(file), -1)
WRAP(ssize_t, pwrite64, (int file, const void *from, size_t size, off64_t to), (file, from, size, to), known(file), -1)
WRAP(ssize_t, sendfile64, (int to, int file, off64_t *from, size_t size), (to, file, from, size), known(to) || known(file), -1)
WRAP(ssize_t, sendfile, (int to, int file, off_t *from, size_t size), (to, file, from, size), known(to) || known(file), -1)
WRAP(int, fsync, (int file), (file), known(file), -1)
WRAP(int, ftruncate, (int file, off_t size), (file, size), known(file), -1)
WRAP(int, ftruncate64, (int file, off64_t size), (file, size), known(file), -1)
WRAP(int, rename, (const char *from, const char *to), (from, to), inside(AT_FDCWD, to), -1)
WRAP(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), inside(b, to), -1)
WRAP(int, link, (const char *from, const char *to), (from, to), inside(AT_FDCWD, to), -1)
WRAP(int, linkat, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags), inside(b, to), -1)
WRAP(int, unlink, (const char *path), (path), inside(AT_FDCWD, path), -1)
WRAP(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags), inside(folder, path), -1)
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode), inside(AT_FDCWD, path), -1)
WRAP(int, mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), inside(folder, path), -1)
WRAP(int, rmdir, (const char *path), (path), inside(AT_FDCWD, path), -1)
WRAP(DIR *, opendir, (const char *path), (path), inside(AT_FDCWD, path), NULL)
WRAP(DIR *, fdopendir, (int file), (file), known(file), NULL)
WRAP(int, stat, (const char *path, struct stat *found), (path, found), inside(AT_FDCWD, path), -1)
WRAP(int, stat64, (const char *path, struct stat64 *found), (path, found), inside(AT_FDCWD, path), -1)
WRAP(int, lstat, (const char *path, struct stat *found), (path, found), inside(AT_FDCWD, path), -1)
WRAP(int, lstat64, (const char *path, struct stat64 *found), (path, found), inside(AT_FDCWD, path), -1)
WRAP(int, fstat, (int file, struct stat *found), (file, found), known(file), -1)
WRAP(int, fstat64, (int file, struct stat64 *found), (file, found), known(file), -1)
WRAP(int, fstatat, (int folder, const char *path, struct stat *found, int flags), (folder, path, found, flags), inside(folder, path), -1)
WRAP(int, fstatat64, (int folder, const char *path, struct stat64 *found, int flags), (folder, path, found, flags), inside(folder, path), -1)
